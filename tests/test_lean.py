"""An import of torchmetrics brings what Lightning needs of it, and the rest when it is asked for."""

import subprocess
import sys

HEAVY = "[m for m in ('torchmetrics.functional', 'torchvision', 'matplotlib', 'scipy', 'sklearn') if m in sys.modules]"


def python(code: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()


def test_a_training_begins_without_the_metrics_and_their_friends():
    code = (
        f"import sys, src.training.fit; from src.data.sources.digits import Digits; Digits().load(None); print({HEAVY})"
    )
    assert python(code) == ["[]"]


def test_what_is_asked_for_later_is_torchmetrics_own():
    code = """
import torchmetrics
from torchmetrics import Accuracy, Metric
from torchmetrics.functional import r2_score
print(Accuracy, Metric, r2_score.__module__, issubclass(torchmetrics.MeanMetric, Metric), torchmetrics.__version__)
print(type(torchmetrics), sorted(name for name in dir(torchmetrics) if not name.startswith("__")))
"""
    assert python(f"import src{code}") == python(code)


def test_a_star_and_a_submodule_find_everything():
    code = "import src; from torchmetrics import *; from torchmetrics.image.fid import FrechetInceptionDistance; "
    code += "print(Accuracy.__module__, FrechetInceptionDistance.__module__)"
    assert python(code) == ["torchmetrics.classification.accuracy torchmetrics.image.fid"]


def test_a_metric_still_draws_itself():
    code = """
import src.training.fit, sys, torch, torchmetrics
from torchmetrics import Metric, MetricCollection
class Count(Metric):
    def __init__(self):
        super().__init__()
        self.count = torch.zeros(())
    def update(self, number): self.count = self.count + number
    def compute(self): return self.count
    def plot(self, val=None, ax=None): return self._plot(val, ax)
one, several = Count(), MetricCollection({"one": Count()})
one.update(2)
several.update(3)
before = "matplotlib" in sys.modules
figure, axes = one.plot()
print(before, type(figure).__name__, several.plot(ax=[axes])[0][1] is axes, "torchmetrics.functional" in sys.modules)
"""
    assert python(code) == ["False Figure True False"]
