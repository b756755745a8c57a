"Runs that are killed, interrupted, poisoned or out of disk, and still end with the same bits."
import json, os, random, resource, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from faults import file_size_limit
from zerolab.data.loader import Loader
from zerolab.scene.cameras import random_views
from zerolab.scene.views import Views
from zerolab.train.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, load_model, save_checkpoint, save_model
from zerolab.train.loop import MetricsFile, MovingAverage, TrainConfig, TrainState, learning_rate_at, make_optimizer, train, train_step

CONFIG = TrainConfig(steps=24, warmup=3, learning_rate=0.01, log_every=3, save_every=5, ema_decay=0.9)


def make_loader(workers=0):
    rng = np.random.default_rng(0)
    objects = [Views(torch.from_numpy(rng.integers(0, 256, (5, 4, 4, 4), dtype=np.uint8)), random_views(rng, 5, size=(4, 4))) for _ in range(7)]
    return Loader(objects, 3, seed=1, views=2, workers=workers)


def make_model(dropout=0.2):
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 1))


def loss(model, batch, step):
    "Uses every source of chance that a loss may use."
    noise = random.gauss(0, 0.01) + np.random.normal() * 0.01 + torch.randn(())*0.01
    error = (model(batch["rgba"].float() / 255).squeeze(1) - batch["index"] / 7 + noise).square().mean()
    return error, dict(step_seen=step, noise=noise)


def stop_at(step_to_stop, action):
    def stopping(model, batch, step):
        if step == step_to_stop: action()
        return loss(model, batch, step)
    return stopping


def content(out, model, history):
    "All that must be the same to the bit."
    rows = [{name: value for name, value in row.items() if name not in ("seconds", "steps_per_second")} for row in history.rows]
    tensors, state = load_checkpoint(list_checkpoints(out / "checkpoints")[-1])
    for clock in ("seconds", "logged"): del state[clock]
    numbers = {name: value.numpy().tobytes() for name, value in tensors.items()}
    return rows, state, numbers, {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def run(out, loss=loss, config=CONFIG, workers=0, **options):
    model, loader = make_model(), make_loader(workers)
    try: return content(out, model, train(model, loader, loss, config, out, progress=False, **options))
    finally: loader.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory): return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("stop", [0, 2, 5, 11, 23])
@pytest.mark.parametrize("workers", [(0, 0), (2, 1)])
def test_resume_is_exact_after_an_error(tmp_path, whole, stop, workers):
    def fail(): raise RuntimeError("gone")
    with pytest.raises(RuntimeError, match="gone"): run(tmp_path, stop_at(stop, fail), workers=workers[0])
    assert run(tmp_path, workers=workers[1]) == whole


KILLED = """
import os, sys, signal
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
import test_train_loop as t
torch.set_num_threads({threads})
t.run(Path(sys.argv[1]), t.stop_at(int(sys.argv[2]), lambda: os.kill(os.getpid(), getattr(signal, sys.argv[3]))))
"""


def in_process(tmp_path, out, stop, signal_name):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent), threads=torch.get_num_threads()))
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.run([sys.executable, script, out, str(stop), signal_name], env=environment, capture_output=True, text=True)


def test_resume_is_exact_after_sigkill_of_a_process(tmp_path, whole):
    out = tmp_path / "out"
    assert in_process(tmp_path, out, 13, "SIGKILL").returncode == -signal.SIGKILL
    assert [path.name for path in list_checkpoints(out / "checkpoints")] == ["step-00000005.safetensors", "step-00000010.safetensors"]
    assert run(out) == whole


def test_sigterm_saves_and_exits_as_such(tmp_path, whole):
    out = tmp_path / "out"
    ended = in_process(tmp_path, out, 13, "SIGTERM")
    assert ended.returncode == 128 + signal.SIGTERM and ended.stderr.startswith("train: stopped at step 14;") and ended.stderr.count("\n") == 1
    assert list_checkpoints(out / "checkpoints")[-1].name == "step-00000014.safetensors"
    assert run(out) == whole


def test_ctrl_c_finishes_the_step_and_handlers_come_back(tmp_path, whole):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 8"): run(tmp_path, stop_at(7, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert run(tmp_path) == whole


def test_second_ctrl_c_ends_at_once(tmp_path, whole):
    def twice():
        for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    with pytest.raises(KeyboardInterrupt, match="at once"): run(tmp_path, stop_at(7, twice))
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000005.safetensors"]
    assert run(tmp_path) == whole


def test_max_seconds_pauses(tmp_path, whole):
    pauses = 0
    while not (tmp_path / "checkpoints" / "step-00000024.safetensors").exists():
        run(tmp_path, max_seconds=0)
        pauses += 1
    assert pauses == 24 and run(tmp_path) == whole


def test_corrupt_newest_checkpoint_falls_back_and_says_so(tmp_path, whole, capsys):
    run(tmp_path)
    older, newest = list_checkpoints(tmp_path / "checkpoints")
    data = newest.read_bytes()
    for damage in (data[:1000], data[:-1] + bytes([data[-1] ^ 1]), b""):
        newest.write_bytes(damage)
        assert run(tmp_path) == whole
        assert newest.name in capsys.readouterr().out
    for path in (older, newest): path.write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"): run(tmp_path)


def test_full_disk_keeps_the_last_checkpoint_whole(tmp_path, whole):
    def fill(): resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with file_size_limit(10**9), pytest.raises(OSError, match="step-00000010.safetensors could not be written"): run(tmp_path, stop_at(7, fill))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005.safetensors"]
    assert run(tmp_path) == whole


def test_metrics_are_cut_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3, "loss": 1.0}\n{"step": 6, "loss": 0.5}\n{"step": 9, "loss": 0.2}\n{"step": 12, "lo')
    metrics = MetricsFile(path, step=6)
    metrics.append(dict(step=9, loss=0.25))
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.0, 0.5, 0.25]
    MetricsFile(path)
    assert path.read_text() == ""


def test_metrics_hold_each_step_once_and_no_nan(tmp_path):
    def poison(model, batch, step):
        value, details = loss(model, batch, step)
        return (value * float("nan") if 3 <= step < 8 else value), details | dict(half=float("inf") if step == 9 else 1.0)
    train(make_model(), make_loader(), poison, replace(CONFIG, skip_factor=1e6), tmp_path, progress=False)
    text = (tmp_path / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["step"] for row in rows] == list(range(3, 25, 3)) and "NaN" not in text and "Infinity" not in text
    assert rows[1]["loss"] is None and rows[3]["half"] is None and rows[-1]["skipped"] == 5


@pytest.mark.parametrize("factor, skipped", [(1e9, True), (float("nan"), True), (float("inf"), True), (1.0, False)])
def test_skipped_step_changes_nothing_but_the_count(factor, skipped):
    state = TrainState(make_model(0), make_loader(), replace(CONFIG, skip_factor=1e3))
    def poisoned(model, batch, step):
        value, details = loss(model, batch, step)
        return value * (factor if step == 2 else 1), details
    def snapshot():
        moments = [value.clone() for values in state.optimizer.state.values() for value in values.values()]
        return [*(p.detach().clone() for p in state.model.parameters()), *moments, *(value.clone() for value in state.average.weights.values())]
    for _ in range(2): assert train_step(state, poisoned)
    before = snapshot()
    assert train_step(state, poisoned) is not skipped
    same = [torch.equal(a, b) for a, b in zip(before, snapshot())]
    assert all(same) if skipped else not any(same[:4])
    assert state.skipped == int(skipped) and state.step == 3
    assert train_step(state, poisoned) and state.skips_in_a_row == 0


def test_moving_average_against_its_definition():
    model = nn.BatchNorm1d(2)
    average, expected = MovingAverage(model, 0.95), model.weight.detach().double().clone()
    for step in range(100):
        with torch.no_grad(): model.weight.copy_(torch.randn(2, generator=torch.Generator().manual_seed(step)))
        model(torch.randn(4, 2))
        average.update(model, step)
        decay = min(0.95, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    assert torch.allclose(average.weights["weight"].double(), expected, atol=1e-6)
    assert average.weights["num_batches_tracked"] == 100


def test_weight_decay_spares_vectors():
    optimizer = make_optimizer(make_model(), CONFIG)
    assert [(group["weight_decay"], {parameter.ndim for parameter in group["params"]}) for group in optimizer.param_groups] == [(0.05, {2}), (0.0, {1})]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(make_model().parameters()))


def test_learning_rate_by_steps_and_by_the_clock():
    config = TrainConfig(steps=100, warmup=10, learning_rate=1.0)
    rates = [learning_rate_at(step, 1e9, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)]) and rates[100] == pytest.approx(0) and rates[55] == pytest.approx(0.5)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    timed = replace(config, time_budget=50)
    assert learning_rate_at(20, 50, timed) == 0 and learning_rate_at(55, 1, timed) == rates[55] > learning_rate_at(55, 40, timed)


def test_other_settings_are_told_and_another_model_is_refused(tmp_path, capsys):
    run(tmp_path)
    run(tmp_path, config=replace(CONFIG, steps=26, learning_rate=0.02))
    assert "going on from step 24 with other settings: steps 24 -> 26, learning_rate 0.01 -> 0.02" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"of another model.*: 1.bias is \(16,\) there and missing in the model") as caught:
        train(nn.Linear(2, 2), make_loader(), loss, CONFIG, tmp_path, progress=False)
    assert "\n" not in str(caught.value)


def test_half_precision_and_ties_are_stored(tmp_path):
    tensors = {"a": torch.randn(3, 2).bfloat16().t(), "b": torch.tensor(True), "c": torch.empty(0, 4)}
    save_checkpoint(tmp_path / "x.safetensors", tensors | {"tied": tensors["a"]}, {})
    again, _ = load_checkpoint(tmp_path / "x.safetensors")
    assert all(torch.equal(again[name], value) and again[name].dtype == value.dtype for name, value in tensors.items())
    save_model(tmp_path / "m", make_model(), {}, dtype=torch.float16)
    assert load_model(tmp_path / "m", lambda config: make_model())[1].weight.dtype == torch.float32


def test_progress_bar_in_a_terminal(tmp_path, capsys):
    train(make_model(), make_loader(), loss, CONFIG, tmp_path)
    shown = capsys.readouterr().err
    assert "24/24" in shown and "loss=" in shown and "lr=" in shown and "step/s" in shown


RANKS = """
import sys, os
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch, torch.distributed as dist
import test_train_loop as t
from zerolab.train.loop import TrainState, train_step
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
def poisoned(model, batch, step):
    value = (model(batch["x"]) - 1).square().mean()
    return value * (float("nan") if step == 3 and rank == 1 else 1), {{}}
class Batches:
    position = 0
    def __iter__(self): return self
    def __next__(self):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(self.position))
        self.position += 1
        return dict(x=x[4 * rank:4 * rank + 4])
torch.manual_seed(0)
state = TrainState(torch.nn.Linear(3, 2), Batches(), t.CONFIG)
kept = [train_step(state, poisoned) for _ in range(8)]
torch.save([kept, state.model.weight.detach(), state.seconds], sys.argv[3] + str(rank))
dist.barrier()
dist.destroy_process_group()
"""


def test_two_ranks_learn_as_one_and_skip_together(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(tests=str(Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, script, str(rank), str(tmp_path / "store"), str(tmp_path / "rank")], env=environment) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    (kept, weight, seconds), other = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in range(2))
    assert kept == other[0] == [step != 3 for step in range(8)] and torch.equal(weight, other[1]) and seconds == other[2]

    class Batches:
        position = 0
        def __next__(self):
            self.position += 1
            return dict(x=torch.randn(8, 3, generator=torch.Generator().manual_seed(self.position - 1)))

    def alone(model, batch, step): return (model(batch["x"]) - 1).square().mean() * (float("nan") if step == 3 else 1), {}
    torch.manual_seed(0)
    state = TrainState(nn.Linear(3, 2), Batches(), CONFIG)
    for _ in range(8): train_step(state, alone)
    assert torch.allclose(state.model.weight, weight, atol=1e-6)
