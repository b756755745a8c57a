"""Monitor: buttons from another thread, weights to the bit, the slider, the stored page, and everything that may go wrong around it."""
import json
import os
import re
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from chromium import Browser, jupyterlab, need_chromium
from zerolab.scene.gaussians import Gaussians
from zerolab.scene.paths import root
from zerolab.train.checkpoint import list_checkpoints
from zerolab.train.loop import TrainConfig, train
from zerolab.view import monitor as module
from zerolab.view.monitor import Monitor, Share, Snapshots, curve_svg, pack_gaussians, ticks

TRUTH = np.full((2, 32, 32, 3), 0.75)


class Numbers:
    "Batches from a generator of their own, which a checkpoint remembers."
    def __init__(self, seed=0): self.generator = torch.Generator().manual_seed(seed)
    def __iter__(self): return self
    def __next__(self): return torch.randn(8, 3, generator=self.generator)
    def state_dict(self): return dict(state=self.generator.get_state().tolist())
    def load_state_dict(self, saved): self.generator.set_state(torch.tensor(saved["state"], dtype=torch.uint8))


def loss(model, batch, step):
    error = (model(batch) - batch.flip(-1)).square().mean()
    return error, {"psnr": float(-10*error.detach().log10())}


def slow(model, batch, step):
    time.sleep(0.004)
    return loss(model, batch, step)


def fresh():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.2), nn.Linear(16, 3))     # dropout draws from the global generator


def pictures(model): return model[2].bias.sigmoid().expand(2, 32, 32, 3)


def splats(model):
    count = 50
    means = torch.linspace(-1, 1, count)[:, None]*torch.ones(3) + model[2].bias
    return Gaussians(means, torch.tensor([[1., 0, 0, 0]]).expand(count, 4), torch.full((count, 3), 0.1), torch.full((count,), 0.7), torch.zeros(count, 1, 3))


def run(out, monitor=None, loss=loss, model=None, steps=40, **settings):
    model = model or fresh()
    config = TrainConfig(**(dict(steps=steps, warmup=2, learning_rate=0.01, log_every=2, save_every=10) | settings))
    return model, train(model, Numbers(), loss, config, out, progress=False, monitor=monitor)


def same(first, second): return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


@pytest.fixture
def live(monkeypatch):
    "A monitor with its widgets, as in a notebook of a person."
    monkeypatch.setattr(module, "has_front_end", lambda: True)
    made = []
    def make(*values, **options):
        made.append(Monitor(*values, **options))
        made[-1]._make_panel()
        return made[-1]
    yield make
    for monitor in made: monitor.close()


def wait(condition, seconds=20.):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


def press(monitor, kind, **more): monitor.panel._msg_callbacks(monitor.panel, dict(kind=kind, **more), [])


def test_buttons_from_another_thread_hold_and_end_a_run(tmp_path, live):
    monitor, seen = live(TRUTH, pictures, every=5), []
    def person():
        wait(lambda: monitor.watch.step >= 5)
        press(monitor, "pause")
        wait(lambda: monitor.watch.state == "paused" == monitor.panel.state)
        before = monitor.watch.step
        time.sleep(0.2)
        seen.append((before, monitor.watch.step, "paused" in monitor.panel.head))
        press(monitor, "resume")
        wait(lambda: monitor.watch.step >= before + 5)
        press(monitor, "stop")
    thread = threading.Thread(target=person)
    thread.start()
    model, history = run(tmp_path, monitor, slow, steps=5000)
    thread.join(20)
    before, after, said = seen[0]
    assert before == after and said and 10 <= history.step < 5000 and not history.finished
    assert monitor.panel.state == "stopped" and list_checkpoints(tmp_path/"checkpoints")[-1].stem == f"step-{history.step:08d}"
    assert history.seconds < time.perf_counter() - monitor.began - 0.2, "a pause is no time of training"


def test_resume_while_a_pause_begins_is_heard(monkeypatch):
    monitor, presses = Monitor(), []
    say = monitor._say

    def interrupted(state):
        "The other thread presses Resume between the question for a pause and its answer."
        if state == "paused":
            presses.append(threading.Thread(target=monitor.resume))
            presses[0].start()
            presses[0].join(0.2)
        say(state)

    monkeypatch.setattr(monitor, "_say", interrupted)
    monitor.watch.state = "running"
    monitor.pause()
    monitor.wish
    presses[0].join(5)
    assert monitor.wish is None and monitor.watch.state == "running"


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path):
    monitor = Monitor(TRUTH, pictures, every=3)
    def stopping(model, batch, step):
        if step == 16: monitor.stop()
        return loss(model, batch, step)
    _, first = run(tmp_path/"stopped", monitor, stopping)
    assert (first.step, first.finished, monitor.watch.state) == (17, False, "stopped")
    went_on, second = run(tmp_path/"stopped", monitor)
    whole, _ = run(tmp_path/"whole")
    assert second.finished and same(went_on, whole) and monitor.watch.state == "finished"
    assert monitor.shots.steps[-1] == 40 and [row["step"] for row in monitor.watch.rows] == list(range(2, 41, 2))


def test_weights_moments_and_metrics_do_not_see_a_monitor(tmp_path):
    def gambling(model):
        assert not model.training and not torch.is_grad_enabled()
        np.random.rand(), torch.rand(3), __import__("random").random()
        return pictures(model.train())
    watched, seen = run(tmp_path/"watched", Monitor(TRUTH, gambling, splats, every=1))
    alone, unseen = run(tmp_path/"alone")
    assert same(watched, alone) and all(torch.equal(seen.average[name], unseen.average[name]) for name in seen.average)
    clock = {"seconds", "steps_per_second"}
    assert [{k: v for k, v in row.items() if k not in clock} for row in seen.rows] == [{k: v for k, v in row.items() if k not in clock} for row in unseen.rows]
    files = [(path.name, path.read_bytes()) for path in sorted((tmp_path/"watched"/"checkpoints").iterdir()) if path.suffix == ".safetensors"]
    from safetensors.torch import load
    for name, data in files:
        other = load((tmp_path/"alone"/"checkpoints"/name).read_bytes())
        assert all(torch.equal(tensor, other[key]) for key, tensor in load(data).items())


def test_its_share_of_the_time_is_kept(tmp_path, monkeypatch):
    now = [1000.]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    def costly(model):
        now[0] += 0.7
        return pictures(model)
    def work(model, batch, step):
        now[0] += 0.6
        return loss(model, batch, step)
    monitor, began = Monitor(TRUTH, costly), now[0]
    run(tmp_path, monitor, work, steps=400, save_every=1000)
    share = monitor.spent/(now[0] - began)
    assert 0.01 < share < 0.03 and len(monitor.watch.own) > 3, share


def test_a_share_is_a_share_whatever_the_cost(monkeypatch):
    now = [0.]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for cost in (0.001, 0.1, 3.):
        pace, began = Share(0.05, 0.), now[0]
        for _ in range(20_000):
            if pace.due:
                with pace.counted(): now[0] += cost
            now[0] += 0.01
        assert pace.spent <= 0.05*(now[0] - began) + cost


@pytest.mark.parametrize("fault", ["render", "gaussians", "shape", "disk", "display", "metrics"])
def test_nothing_of_it_reaches_the_training(tmp_path, live, monkeypatch, fault):
    def broken(*_, **__): raise OSError(28, "No space left on device")
    monitor = live(TRUTH, broken if fault == "render" else (lambda model: pictures(model)[:1]) if fault == "shape" else pictures,
                   broken if fault == "gaussians" else splats, every=4)
    if fault == "disk": monkeypatch.setattr(np, "savez", broken)
    if fault == "display": monkeypatch.setattr(monitor.panel, "set_trait", broken), monkeypatch.setattr(module, "curve_svg", broken)
    if fault == "metrics": (tmp_path/"run").mkdir(), (tmp_path/"run"/"metrics.jsonl").write_text('{"step": 1, "loss": "x"}\n[3]\n{"st')
    watched, history = run(tmp_path/"run", monitor)
    alone, _ = run(tmp_path/"alone")
    assert history.finished and same(watched, alone) and monitor.watch.state == "finished"
    said = dict(shape="1 pictures were drawn, the truth has 2", metrics="").get(fault, "No space left on device")
    assert said in monitor.watch.note and (fault == "display" or said in monitor.page())


def test_the_slider_turns_to_a_step_and_the_newest_follow(tmp_path, live):
    monitor = live(TRUTH, pictures, splats, every=4)
    run(tmp_path, monitor)
    assert monitor.panel.steps == monitor.shots.steps == list(range(0, 41, 4)) and monitor.view in monitor.box.children
    newest, taken = monitor.panel.shots, []
    monitor.view.set_data = taken.append
    press(monitor, "show", step=8)
    assert monitor.panel.shown == 8 and monitor.panel.shots != newest and len(taken[0]) == 50
    assert torch.allclose(taken[0].means, monitor.shots.gaussians(8).means)
    press(monitor, "show", step=-1)
    assert monitor.panel.shown == -1 and monitor.panel.shots == newest
    press(monitor, "show", step=999)
    assert "no snapshot of step 999" in monitor.watch.note
    for nonsense in (None, {}, {"kind": "fly"}, {"kind": "show", "step": "x"}): monitor._answer(nonsense)


def test_a_step_that_is_looked_at_stays_while_training_goes_on(tmp_path, live):
    monitor, looked = live(TRUTH, pictures, every=1, snapshots=6), []
    def looking(model, batch, step):
        if step == 4: press(monitor, "show", step=2), looked.append(monitor.panel.shots)
        if step == 6: assert monitor.panel.shots == looked[0] and monitor.panel.shown == 2 and monitor.panel.steps[-1] == 6
        return loss(model, batch, step)
    run(tmp_path, monitor, looking)
    assert len(monitor.panel.steps) == 6 and monitor.panel.shown in monitor.panel.steps[:-1], "thinned away: the nearest one"
    assert monitor.panel.shots == monitor._shot(monitor.panel.shown, view=False)


def test_snapshots_are_bounded_and_cover_the_run(tmp_path):
    shots = Snapshots(tmp_path, 10)
    for step in range(3000): shots.add(step, psnr=np.float32(step)) if step % 7 == 0 else None
    steps = shots.steps
    assert 5 <= len(steps) <= 10 and steps[0] == 0 and steps[-1] == 2996
    assert np.diff(steps).max() <= 3000*2.5/len(steps) and len(list(tmp_path.iterdir())) == len(steps)
    shots.drop_after(steps[3])
    assert shots.steps == steps[:4]


def test_a_resumed_run_forgets_what_it_will_do_again(tmp_path):
    def dies(model, batch, step):
        if step == 27: raise RuntimeError("the machine is gone")
        return loss(model, batch, step)
    monitor = Monitor(TRUTH, pictures, every=1, snapshots=60)
    with pytest.raises(RuntimeError, match="the machine is gone"): run(tmp_path, monitor, dies)
    assert monitor.watch.state == "failed" and "the machine is gone" in monitor.page() and monitor.shots.steps == list(range(28))
    again = Monitor(TRUTH, pictures, every=40)
    run(tmp_path, again)
    assert again.shots.steps == [*range(21), 40] and [step for step, _ in again.watch.own] == [*range(21), 40]


def test_control_c_in_the_cell(tmp_path):
    def pressed(model, batch, step):
        if step == 6: os.kill(os.getpid(), signal.SIGINT)
        return loss(model, batch, step)
    monitor = Monitor(TRUTH, pictures, every=100)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 7"): run(tmp_path, monitor, pressed)
    assert monitor.watch.state == "interrupted" and Monitor.open(tmp_path).watch.state == "interrupted"


def test_control_c_ends_a_pause(tmp_path):
    monitor = Monitor(TRUTH, pictures, every=100)
    def pausing(model, batch, step):
        if step == 3: monitor.pause(), threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        return loss(model, batch, step)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 4"): run(tmp_path, monitor, pausing)


def test_a_run_by_the_clock_says_what_is_left(tmp_path, live):
    heads, monitor = [], live(TRUTH, pictures)
    monitor.panel.observe(lambda change: heads.append(change["new"]), "head")
    _, history = run(tmp_path, monitor, slow, steps=10**6, time_budget=0.8)
    assert history.finished and monitor.watch.state == "finished" and "width:100.0%" in monitor.panel.head
    assert any("left" in head and "of 1,000,000" not in head for head in heads)


def test_the_stored_page_is_whole_small_and_asks_nothing_of_the_network(tmp_path):
    generator = np.random.default_rng(0)
    truth = generator.random((4, 128, 128, 3))      # noise is the worst case of every encoder
    monitor = Monitor(truth, lambda model: truth*0.9, splats, every=2, title="<b>x</b>")
    run(tmp_path, monitor)
    page = monitor.page()
    assert len(page) < 100_000 and "<script" not in page and "<b>x</b></b>" not in page
    assert not re.findall(r"https?://", page.replace("http://www.w3.org/2000/svg", ""))
    leaves = re.findall(r'class="zm-shot" data-step="step ([\d,]+)"( hidden)?', page)
    assert len(leaves) >= 1 and leaves[-1] == ("40", "") and all(hidden for _, hidden in leaves[:-1])
    for part in ("loss", "psnr", "PSNR of the pictures, dB", "finished", "truth"): assert part in page
    small = Monitor(TRUTH, pictures, every=2)
    run(tmp_path/"small", small)
    assert len(re.findall("zm-shot\"", small.page())) == 12
    assert (tmp_path/"small"/"monitor"/"monitor.html").read_text().startswith("<!doctype html>")
    assert "waiting" in Monitor().page()


def test_an_opened_run_is_the_run(tmp_path):
    monitor = Monitor(TRUTH, pictures, splats, every=5, title="cups")
    run(tmp_path, monitor)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = Monitor.open(tmp_path)
    assert again.page() == monitor.page() and again.watch.title == "cups"
    (tmp_path/"monitor"/"about.json").unlink()
    under_way = Monitor.open(tmp_path).watch
    assert (under_way.step, under_way.state) == (40, "unfinished"), "a run that is under way elsewhere has no such file yet"
    before.pop(tmp_path/"monitor"/"about.json")
    assert all(path.stat().st_mtime_ns == value for path, value in before.items() if path.is_file())


def test_one_look_gives_pictures_and_gaussians(tmp_path):
    monitor, calls = Monitor(TRUTH, lambda model: calls.append(1) or (pictures(model), splats(model)), every=20), []
    run(tmp_path, monitor)
    assert monitor.watch.note == "" and len(calls) == 3 and len(monitor.shots.gaussians(20)) == 50 and len(monitor.watch.own) == 3
    two = Monitor(TRUTH, lambda model: tuple(pictures(model)), every=20)      # a pair of pictures is no such pair
    run(tmp_path/"two", two)
    assert two.watch.note == "" and len(two.watch.own) == 3 and two.shots.gaussians(20) is None


def test_a_killed_run_is_seen_as_unfinished(tmp_path):
    run(tmp_path, Monitor(TRUTH, pictures, every=10), steps=20)
    rows = (tmp_path/"metrics.jsonl").read_text()
    (tmp_path/"metrics.jsonl").write_text(rows + json.dumps(dict(step=33, loss=.1, seconds=9.)) + "\n")
    again = Monitor.open(tmp_path)
    assert (again.watch.state, again.watch.step) == ("unfinished", 33) and "unfinished" in again.page()


def test_no_thread_is_left(tmp_path, live):
    before = threading.active_count()
    monitor = live(TRUTH, pictures, splats, every=4)
    run(tmp_path, monitor)
    assert monitor.view is not None
    monitor.close()
    wait(lambda: threading.active_count() <= before, 10)
    run(tmp_path/"next", monitor, steps=4)
    assert monitor.watch.state == "finished"


def test_packed_gaussians_are_those_that_are_seen():
    many = Gaussians(torch.randn(300, 3), torch.randn(300, 4), torch.rand(300, 3) + 0.01, torch.rand(300), torch.randn(300, 4, 3))
    few = pack_gaussians(many, most=100)
    weight = many.opacities*many.scales.sort(-1).values[:, 1:].prod(-1)
    weight[many.opacities <= 1/255] = -1
    kept = many.means[weight >= weight.topk(100).values.min()].half().numpy()
    assert few["sh"].shape == (100, 4, 3) and np.array_equal(few["means"], kept)


@pytest.mark.parametrize("values", [[1.], [2., 2.], [0., 0., 0.], [-3., 5.], [float("nan"), 1.], [1e-12, 1e9], [float("inf"), 1., 2.], []])
def test_any_values_make_a_curve(values):
    svg = curve_svg("x", range(len(values)), values)
    assert "nan" not in svg and "inf" not in svg
    import xml.etree.ElementTree as tree
    tree.fromstring(svg)


def test_ticks_are_inside_and_few():
    generator = np.random.default_rng(0)
    for low, width, log in zip(10**generator.uniform(-6, 6, 200), 10**generator.uniform(-1, 3, 200), generator.random(200) < 0.5):
        high = low*(1 + width)
        found = ticks(low, high, log)
        assert 2 <= len(found) <= 6 and all(low*(1 - 1e-9) <= t <= high*(1 + 1e-9) for t in found), (low, high, log, found)


NOTEBOOK = """
import sys, time, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_view_monitor import TRUTH, fresh, pictures, slow, splats, Numbers
from zerolab.train.loop import TrainConfig, train
from zerolab.view.monitor import Monitor
monitor = Monitor(TRUTH, pictures, splats, every=50, title="line")
history = train(fresh(), Numbers(), slow, TrainConfig(steps=10**6, warmup=5, log_every=5), Path("run"), progress=False, monitor=monitor)
print("ended with", history.step, history.finished)
"""


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on one notebook that trains, with settings of its own; its address."""
    need_chromium()
    (tmp_path/"work").mkdir()
    cell = dict(cell_type="code", id="train", metadata={}, outputs=[], execution_count=None, source=NOTEBOOK.format(tests=str(root()/"tests")))
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    (tmp_path/"work"/"monitor.ipynb").write_text(json.dumps(dict(cells=[cell], metadata=kernel, nbformat=4, nbformat_minor=5)))
    with jupyterlab(tmp_path, tmp_path/"work", ZEROLAB_STATIC="0") as address: yield f"{address}/lab/tree/monitor.ipynb"


STEP = "Number((document.querySelector('.zm-head b + .zm-state + span b') || {textContent: '0'}).textContent.replace(/,/g, ''))"
STATE = "(document.querySelector('.zm-state') || {}).textContent"


def click(browser, name): browser.evaluate(f"document.querySelector('.zm-{name}').click()")


@pytest.mark.slow
def test_a_person_pauses_resumes_and_stops_in_jupyterlab(lab):
    browser = Browser()
    try:
        browser.call("Emulation.setDeviceMetricsOverride", width=1500, height=1000, deviceScaleFactor=1, mobile=False)
        browser.call("Page.navigate", url=lab)
        browser.wait("!!window.jupyterapp && [...jupyterapp.shell.widgets('main')][0]?.sessionContext?.session?.kernel?.status == 'idle'", 90)
        browser.evaluate("jupyterapp.commands.execute('notebook:run-all-cells'), 1")
        browser.wait(f"{STATE} == 'running' && {STEP} > 20", 90)
        browser.wait("document.querySelectorAll('.zm-curves svg').length >= 2 && document.querySelectorAll('.zm-pictures img').length == 4", 30)
        browser.wait("!!document.querySelector('.zm-scrub input') && Number(document.querySelector('.zm-scrub input').max) > 0")
        click(browser, "pause")
        browser.wait(f"{STATE} == 'paused'")
        before = browser.evaluate(STEP)
        time.sleep(1.)
        assert browser.evaluate(STEP) == before > 20, "the steps stand still"
        newest = browser.evaluate("document.querySelector('.zm-shots').innerHTML")
        browser.evaluate("(s => { s.value = 0; s.dispatchEvent(new Event('input')); })(document.querySelector('.zm-scrub input'))")
        browser.wait("document.querySelector('.zm-scrub output').textContent == 'step 0'")
        browser.wait(f"document.querySelector('.zm-shots').innerHTML != {json.dumps(newest)}")
        if os.environ.get("MONITOR_PICTURE"): browser.screenshot(os.environ["MONITOR_PICTURE"])
        click(browser, "latest")
        browser.wait("document.querySelector('.zm-latest').hidden")
        click(browser, "pause")
        browser.wait(f"{STATE} == 'running' && {STEP} > {before} + 5")
        click(browser, "stop")
        browser.wait(r"/ended with \d+ False/.test(document.body.innerText)", 30)
        browser.wait(f"{STATE} == 'stopped'")
        assert browser.evaluate("document.querySelector('.zm-pause').hidden && document.querySelectorAll('.zm').length == 1")
        assert [url for url in browser.requests if url.startswith("http") and not url.startswith(lab.split("/lab/")[0])] == []
    finally: browser.close()
