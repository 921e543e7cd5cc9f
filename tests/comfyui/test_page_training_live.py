"""Real trainings in ComfyUI's real page: followed in two browsers, queued, only checked, refused."""

import pytest
from comfyui_page import comfy_page, missing
from comfyui_side import needs_comfyui
from comfyui_training import QUICK, quick_run

from srpo_core import launch
from srpo_core.run_state import read_state

pytestmark = [needs_comfyui, pytest.mark.skipif(bool(missing()), reason=f"no page: {missing()}")]

LISTS_LORA = """(name) => {
  const [first, second] = LiteGraph.registered_node_types.LoraLoader.nodeData.input.required.lora_name;
  return [first, second?.options].some((list) => Array.isArray(list) && list.includes(name));
}"""


def test_a_real_training_in_two_browsers(clean, browser, server, runs):
    """One stops it and both see that; it is resumed, ends, and its file is in the loaders' lists without a reload."""
    name = f"page-real-{'vue' if clean.page.evaluate('LiteGraph.vueNodesMode') else 'canvas'}"
    result = server.base / "models" / "loras" / f"{name}.safetensors"
    launch.start(quick_run(runs / name, 400, {"output.result": result}))
    vue = clean.page.evaluate("LiteGraph.vueNodesMode")
    with comfy_page(browser, server, vue_nodes=vue) as other:
        boxes = [(page, page.show(run=name)) for page in (clean, other)]
        for page, box in boxes:
            page.until_training(box, lambda shown: shown["status"] == "Training" and shown["curves"])
        other_page, other_box = boxes[1]
        other_box.query_selector("footer button:text-is('Stop')").click()
        for page, box in boxes:
            shown = page.until_training(box, lambda shown: shown["status"] == "Stopped")
            assert "Resume" in shown["buttons"]
        stopped = read_state(runs / name).step
        assert stopped < 400
        box = boxes[0][1]
        launch.resume(runs / name, steps=stopped + 3)
        for page, one in boxes:
            page.until_training(one, lambda shown: shown["status"] == "Finished")
        shown = clean.until_training(box, lambda shown: f"saved as loras/{result.name}" in shown["line"])
        assert shown["percent"] == 100
        clean.page.wait_for_function(LISTS_LORA, arg=result.name)
        assert other_page.errors == []


def quick_train(page, name, **values):
    """SRPO Train alone in the graph, for a few quick steps of the miniature: its id."""
    more = "\n".join(f"{key}={value}" for key, value in QUICK.items())
    return page.add("SRPOTrain", **{"name": name, "steps": 3, "preview_every": 2, "more_settings": more, **values})


def test_a_training_that_the_page_queues(clean):
    """Its node shows the run from the start to the end, and again after a reload; the view is no setting."""
    name = f"page-queued-{'vue' if clean.page.evaluate('LiteGraph.vueNodesMode') else 'canvas'}"
    node = quick_train(clean, name)
    saved = clean.serialized()
    inputs = clean.page.evaluate("async (id) => Object.keys((await app.graphToPrompt()).output[id].inputs)", node)
    assert "srpo_run" not in inputs
    box = clean.live_box(node)
    clean.until_training(box, lambda shown: name in shown["idle"])
    clean.queue()
    starting = clean.until_training(box, lambda shown: shown["name"] == name)
    assert "Stop" in starting["buttons"]
    end = clean.end()
    assert end["type"] == "execution_success", end["detail"]
    shown = clean.until_training(box, lambda shown: shown["status"] == "Finished" and shown["preview"])
    assert f"saved as loras/{name}.safetensors" in shown["line"]
    clean.page.wait_for_function(LISTS_LORA, arg=f"{name}.safetensors")
    clean.reload()
    clean.load(saved)
    clean.settled()
    assert clean.until_training(clean.live_box(node), lambda shown: shown["preview"])["status"] == "Finished"


def test_a_plan_that_is_only_checked(clean):
    node = quick_train(clean, "page-nothing-here", mode="check only")
    end = clean.run()
    assert end["type"] == "execution_success", end["detail"]
    box = clean.live_box(node)
    rows = clean.page.wait_for_function("(box) => box.querySelector('.srpo-table tbody')?.innerText", arg=box)
    assert "memory" in rows.json_value()
    assert "Only checked" in box.inner_text(), "the command that stands there needs a run.json"
    assert clean.training(box)["name"] == ""


def test_a_plan_stays_when_another_graph_starts_a_run(clean):
    """All pages are told of it, and a node there may have the same number."""
    node = quick_train(clean, "page-planned", mode="check only")
    assert clean.run()["type"] == "execution_success"
    box = clean.live_box(node)
    clean.page.wait_for_function("(box) => box.querySelector('.srpo-table')", arg=box)
    told = """([node, run]) => window.comfyAPI.api.api.dispatchEvent(
      new CustomEvent("srpo.run", { detail: { node: String(node), run } }))"""
    clean.page.evaluate(told, [node, "another-one"])
    assert box.query_selector(".srpo-table")
    clean.page.evaluate(told, [node, "page-planned-2"])
    assert not box.query_selector(".srpo-table")


def test_a_refusal_stands_in_the_node(clean):
    """Until the node runs again, and then no more."""
    node = quick_train(clean, "page-refused", mode="check only", more_settings="optim.nonsense=1")
    box = clean.live_box(node)
    end = clean.run()
    assert end["type"] == "execution_error"
    shown = clean.until_training(box, lambda shown: shown["refusal"])
    assert "optim.nonsense" in shown["refusal"]
    assert shown["idle"] == ""
    clean.page.evaluate(
        "(id) => app.graph.getNodeById(id).widgets.find((one) => one.name === 'more_settings').value = ''", node
    )
    assert clean.run()["type"] == "execution_success"
    clean.until_training(box, lambda shown: shown["refusal"] == "")
