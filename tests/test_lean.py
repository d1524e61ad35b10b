"""An import of torchmetrics brings what Lightning needs of it, and the rest when it is asked for."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = "[m for m in ('torchmetrics.functional', 'torchvision', 'matplotlib', 'scipy', 'sklearn') if m in sys.modules]"


def python(code: str) -> list[str]:
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_what_trains_is_imported_without_the_metrics_and_their_friends():
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
print(type(torchmetrics), torchmetrics.__license__, [n for n in dir(torchmetrics) if not n.startswith("__")])
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
try:
    several.plot(ax=5, together=True)
except ValueError:
    print("refused")
"""
    assert python(code) == ["False Figure True False", "refused"]


def test_threads_that_ask_at_once_all_get_it():
    code = """
import src, torchmetrics
from concurrent.futures import ThreadPoolExecutor
def ask(name):
    from torchmetrics import Accuracy
    return getattr(torchmetrics, name)
with ThreadPoolExecutor(4) as pool:
    print([found.__name__ for found in pool.map(ask, ["Accuracy", "MeanMetric", "F1Score", "functional"])])
"""
    assert python(code) == ["['Accuracy', 'MeanMetric', 'F1Score', 'torchmetrics.functional']"]


def test_a_module_can_be_pickled_by_its_name():
    code = "import src, pickle, torchmetrics; print(pickle.loads(pickle.dumps(torchmetrics)) is torchmetrics)"
    assert python(code) == ["True"]


def test_a_version_that_is_built_otherwise_is_imported_as_ever(tmp_path):
    """One without what the lean import looks for, and whose modules ask the package for what it defines first."""
    package = tmp_path / "torchmetrics"
    (package / "utilities").mkdir(parents=True)
    (package / "__init__.py").write_text("first = 1\nfrom torchmetrics.metric import Metric\nMetricCollection = dict\n")
    (package / "utilities" / "__init__.py").write_text("from torchmetrics import first\n")
    (package / "metric.py").write_text("from torchmetrics.utilities import first\nclass Metric: number = first\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import src; import torchmetrics;"
    code += "print(type(torchmetrics).__name__, torchmetrics.Metric.number, torchmetrics.MetricCollection.__name__)"
    assert python(code) == ["module 1 dict"]
