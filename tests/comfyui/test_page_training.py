"""Views of runs in ComfyUI's real page: in nodes and in the side panel, and what is asked when."""

import itertools
import subprocess
import sys

import pytest
import torch
from comfyui_page import missing
from comfyui_server import NAME
from comfyui_side import needs_comfyui
from fake_runs import PROMPTS, make_run

from srpo_core.metrics import read_metrics
from srpo_core.preview import save_preview
from srpo_core.run_state import write_state

pytestmark = [needs_comfyui, pytest.mark.skipif(bool(missing()), reason=f"no page: {missing()}")]

MARKUP = "<img src=x onerror='window.broken = true'> & <b>bold</b>"
PANEL = "Workspace.ToggleSidebarTab.srpo-runs"


def made(folder, steps=40, of=None):
    """A run with a preview every 10 steps."""
    make_run(folder, steps, of=of, evaluation=False)
    generator = torch.Generator().manual_seed(0)
    for step in range(0, steps + 1, 10):
        images = torch.rand(len(PROMPTS), 3, 32, 32, generator=generator)
        save_preview(folder, step, PROMPTS, images, {"relative": [step / 100] * len(PROMPTS)})
    return folder


@pytest.fixture(scope="module")
def finished(runs):
    """A run that has ended, of 40 steps."""
    return made(runs / "page-finished")


@pytest.fixture(scope="module")
def working(runs):
    """A run that a process seems to be at, at step 20 of 40, as long as these tests go on."""
    folder = made(runs / "page-working", 20, of=40)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        write_state(folder, "training", 40, process.pid)
        yield folder
        process.kill()


@pytest.fixture(scope="module")
def failed(runs):
    """A run that failed at step 4 of 40, for a reason that looks like a page's source."""
    folder = made(runs / "page-failed", 4, of=40)
    write_state(folder, "failed", 40, error=MARKUP)
    return folder


def asked(page, milliseconds=4000):
    """Addresses of ours that the page asks for in some time, without the ones of before."""
    page.page.wait_for_timeout(1000)  # what is on its way has come
    found = []
    listen = lambda request: "/srpo/" in request.url and found.append(request.url)  # noqa: E731
    page.page.on("request", listen)
    page.page.wait_for_timeout(milliseconds)
    page.page.remove_listener("request", listen)
    return found


def test_a_finished_run_in_a_node(clean, finished):
    """Its curves, each with its last value, its newest preview, and what can be done with it."""
    shown = clean.until_training(clean.show(run=finished.name), lambda shown: shown["preview"])
    assert (shown["name"], shown["status"], shown["percent"]) == (finished.name, "Finished", 100)
    assert "40 steps" in shown["line"]
    assert shown["curves"] == [2, 1]
    assert list(shown["legends"][0]) == ["denoise", "inversion"]
    last = read_metrics(finished)[-1]["preview"]
    assert shown["legends"][1]["relative"] == pytest.approx(last["relative"], abs=6e-4)
    assert shown["tabs"][0] == ["Score", "Reward", "Loss", "Gradient"]
    assert set(last) - {"relative"} <= set(shown["tabs"][1])
    assert "step=40" in shown["preview"]
    assert "Open report" in shown["buttons"]
    assert not {"Stop", "Resume"} & set(shown["buttons"])


def test_a_run_at_work_in_a_node(clean, working):
    box = clean.show(run=working.name)
    shown = clean.until_training(box, lambda shown: shown["preview"])
    assert (shown["status"], shown["percent"], shown["line"]) == ("Training", 50, "step 20 of 40")
    assert shown["left"].startswith("about ")
    assert "Stop" in shown["buttons"]
    assert clean.page.evaluate("(box) => box.scrollWidth <= box.clientWidth", box)


def test_log_and_plan_open_and_close(clean, working):
    (working / "train.log").write_text("".join(f"line {i}\n" for i in range(100)))
    box = clean.show(run=working.name)
    assert clean.until_training(box, lambda shown: shown["status"])["log"] == ""
    box.query_selector("footer button:text-is('Log')").click()
    log = clean.until_training(box, lambda shown: "line 99" in shown["log"])["log"]
    assert "line 60" in log and "line 59\n" not in log
    box.query_selector("footer button:text-is('Plan')").click()
    plan = dict(clean.until_training(box, lambda shown: shown["plan"])["plan"])
    assert str(working) in plan["folder"]
    assert "run.json" in plan["command"]
    for text in ("Log", "Plan"):
        box.query_selector(f"footer button:text-is('{text}')").click()
    shown = clean.training(box)
    assert (shown["log"], shown["plan"]) == ("", [])


def test_earlier_previews(clean, finished):
    box = clean.show(run=finished.name)
    clean.until_training(box, lambda shown: "step=40" in shown["preview"])
    clean.page.evaluate(
        """(slider) => { slider.value = 2; slider.dispatchEvent(new Event("input")); }""",
        box.query_selector("input[type=range]"),
    )
    shown = clean.until_training(box, lambda shown: "step=20" in shown["preview"])
    assert shown["caption"] == "before | after 20 steps"


def test_training_on_is_offered_to_a_later_step(clean, finished):
    """A step that has been reached meanwhile is none."""
    box = clean.show(run=finished.name)
    clean.until_training(box, lambda shown: shown["name"])
    steps = box.query_selector("form input")
    assert steps.input_value() == "80"
    clean.page.evaluate("(input) => (input.value = 40)", steps)
    for _ in range(2):
        box.query_selector("footer button:text-is('Plan')").click()
    assert steps.input_value() == "80"


def test_a_tab_shows_other_curves(clean, finished):
    box = clean.show(run=finished.name)
    clean.until_training(box, lambda shown: shown["curves"])
    box.query_selector("nav button:text-is('Loss')").click()
    assert list(clean.training(box)["legends"][0]) == ["loss"]


def test_why_a_run_failed_is_no_markup(clean, failed):
    shown = clean.until_training(clean.show(run=failed.name), lambda shown: shown["error"])
    assert (shown["error"], shown["status"]) == (MARKUP, "Failed")
    assert "Resume" in shown["buttons"]
    assert clean.page.evaluate("window.broken") is None


def test_a_node_follows_its_widget(clean, finished, working):
    """Another name in the widget is another run, and one that nobody has trained is said to be none."""
    box = clean.show(run=finished.name)
    clean.until_training(box, lambda shown: shown["name"] == finished.name)
    set_name = "(name) => (app.graph.nodes[0].widgets[0].value = name)"
    clean.page.evaluate(set_name, working.name)
    clean.until_training(box, lambda shown: shown["name"] == working.name)
    clean.page.evaluate(set_name, "nobody-trained-this")
    shown = clean.until_training(box, lambda shown: "nobody-trained-this" in shown["idle"] and not shown["name"])
    assert shown["status"] == ""


def test_the_view_is_no_setting(clean, finished):
    box = clean.show(run=finished.name)
    clean.until_training(box, lambda shown: shown["name"])
    (node,) = clean.serialized()["nodes"]
    assert node["widgets_values"] == [finished.name]
    prompt = clean.page.evaluate("async () => (await app.graphToPrompt()).output")
    assert [sorted(one["inputs"]) for one in prompt.values()] == [["run"]]


def test_a_run_comes_back_with_the_page(clean, finished):
    clean.show(run=finished.name)
    saved = clean.serialized()
    clean.reload()
    clean.load(saved)
    clean.settled()
    box = clean.live_box(saved["nodes"][0]["id"])
    assert clean.until_training(box, lambda shown: shown["preview"])["name"] == finished.name


def test_nothing_is_asked_about_what_is_out_of_sight(clean, working):
    """A run at work is asked about while its node can be seen, and no more when it is scrolled away or gone."""
    box = clean.show(run=working.name)
    clean.until_training(box, lambda shown: shown["name"])
    assert len(asked(clean)) >= 2
    clean.page.evaluate("() => { app.canvas.ds.offset = [9000, 9000]; app.canvas.draw(true, true); }")
    clean.settled()
    assert asked(clean) == []
    clean.page.evaluate("() => { app.canvas.ds.offset = [0, 0]; app.canvas.draw(true, true); }")
    clean.settled()
    assert asked(clean)
    clean.page.evaluate("() => app.graph.clear()")
    assert asked(clean) == []


def test_only_new_steps_are_asked_for(clean, working):
    box = clean.show(run=working.name)
    clean.until_training(box, lambda shown: shown["name"])
    assert all("after=20" in address for address in asked(clean) if working.name in address)


@pytest.fixture
def panel(clean):
    """The side panel, open; nothing else is in the page."""
    clean.page.evaluate("() => app.graph.clear()")
    clean.command(PANEL)
    yield clean.page.wait_for_selector(".srpo-runs")
    clean.command(PANEL)


def card(page, name):
    return page.page.locator(".srpo-runs li", has=page.page.get_by_text(name, exact=True))


def test_the_panel_lists_runs(clean, panel, finished, working):
    card(clean, working.name).locator(".srpo-status", has_text="Training").first.wait_for()
    assert "step 20 of 40" in card(clean, working.name).inner_text()
    assert "Finished" in card(clean, finished.name).inner_text()


def test_the_panel_opens_a_run(clean, panel, finished, working):
    for folder in (finished, working):
        one = card(clean, folder.name)
        head = one.locator("> button")
        if head.get_attribute("aria-expanded") != "true":
            head.click()
        shown = clean.until_training(one.element_handle(), lambda shown: shown["preview"])
        assert folder.name in shown["preview"]
        assert shown["curves"] == [2, 1]
    assert clean.page.locator(".srpo-runs .srpo-run").count() == 1


def test_a_closed_panel_asks_nothing(clean, panel, working):
    card(clean, working.name).wait_for()
    assert asked(clean)
    clean.command(PANEL)
    assert asked(clean) == []
    clean.command(PANEL)
    assert asked(clean)


CHART = f"await import('/extensions/{NAME}/chart.js')"


def test_marks_of_an_axis_are_round_and_inside(clean):
    ranges = [[0, 1], [-0.06, 0.23], [0, 40], [3.2, 3.21], [-5, -1], [0, 12345]]
    found = clean.page.evaluate(f"async (ranges) => {{ const {{ ticks }} = {CHART}; "
                                "return ranges.map(([low, high]) => ticks(low, high, 4)); }", ranges)  # fmt: skip
    for (low, high), marks in zip(ranges, found, strict=True):
        assert 2 <= len(marks) <= 9
        assert low - 1e-9 <= marks[0] and marks[-1] <= high + 1e-9
        steps = [b - a for a, b in itertools.pairwise(marks)]
        assert steps == pytest.approx([steps[0]] * len(steps))


def test_a_smoothed_line_keeps_a_constant_and_a_long_one_its_mean(clean):
    script = f"""async () => {{
      const {{ points, smooth }} = {CHART};
      const steps = [...Array(1000).keys()];
      const values = steps.map((step) => Math.sin(step));
      const mean = (pairs) => pairs.reduce((sum, pair) => sum + pair[1], 0) / pairs.length;
      const few = points(steps, values);
      return {{
        constant: smooth(steps.map((step) => [step, 3])).map((pair) => pair[1]), count: few.length,
        means: [mean(few), values.reduce((a, b) => a + b) / 1000], gaps: points([1, 2, 3], [1, null, 3]),
      }};
    }}"""
    found = clean.page.evaluate(script)
    assert found["constant"] == pytest.approx([3] * 1000)
    assert found["count"] <= 300
    assert found["means"][0] == pytest.approx(found["means"][1], abs=1e-9)
    assert found["gaps"] == [[1, 1], [3, 3]]
