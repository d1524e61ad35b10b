"""The grid of samples, drawn by all ranks."""

from tests.warm import finish

SAMPLER = ["sampler=ddim", "sampler.steps=5"]  # of experiment=smoke


def test_the_grid_is_what_the_checkpoint_draws(command, smoke_run, tmp_path):
    outcome = command("sample", f"run={smoke_run}", f"out={tmp_path}", "num_samples=16", "batch_size=5", *SAMPLER)
    assert outcome.code == 0, outcome.err
    assert (smoke_run / "samples" / "step=20.png").read_bytes() == (tmp_path / "grid.png").read_bytes()


def test_the_grid_of_two_processes_is_what_one_draws(command, tmp_path):
    """To the bit, from the weights that the two have trained."""
    run, out = tmp_path / "run", tmp_path / "out"
    arguments = ["experiment=smoke", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    arguments += ["callbacks.samples.num_samples=70", "callbacks.samples.every_n_steps=20"]
    log = tmp_path / "log"
    assert finish(*arguments, f"hydra.run.dir={run}", output=log) == 0, log.read_text()
    outcome = command("sample", f"run={run}", f"out={out}", "num_samples=70", *SAMPLER)
    assert outcome.code == 0, outcome.err
    assert [path.name for path in (run / "samples").iterdir()] == ["step=20.png"]
    assert (run / "samples" / "step=20.png").read_bytes() == (out / "grid.png").read_bytes()
