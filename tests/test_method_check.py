"""The method check's structure and laws, on the miniature's weights and on made-up curves."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from srpo_core.config import ConfigError
from srpo_core.description import load_run
from srpo_core.miniature.models import WEIGHTS
from srpo_core.report import write_report

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import method_check
import method_check_align as align
import method_check_inversion as inversion

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
needs_weights = pytest.mark.skipif(not (WEIGHTS / "judge.safetensors").is_file(), reason="the miniature's weights")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """`align` on two prompts and two levels: the folder, the claims and the numbers per prompt."""
    out = tmp_path_factory.mktemp("check")
    assert method_check.main(["align", "--out", str(out), "--prompts", "2", "--levels", "0.6", "0.95"]) == 0
    claims, record = (json.loads((out / name).read_text()) for name in ("method_check.json", "align.json"))
    return out, claims["claims"], record["recovered"]


@needs_weights
def test_align_records_a_row_per_level_and_a_picture(measured):
    out, claims, recovered = measured
    assert [claim["name"] for claim in claims] == ["align", "align-lengths"]
    assert all([row["sigma"] for row in claim["rows"]] == [0.6, 0.95] for claim in claims)
    assert (out / claims[0]["image"]).is_file()
    assert [len(one["psnr"]) for one in recovered] == [2] * len(recovered)


@needs_weights
def test_direct_align_errs_by_its_share_of_one_step_prediction(measured):
    for level in (0.6, 0.95):
        *aligned, predicted = [one for one in measured[2] if one["sigma"] == level]
        assert predicted["length"] is None
        assert predicted["share"] == 1
        for one in aligned:
            np.testing.assert_allclose(one["error"], one["share"] * np.array(predicted["error"]), rtol=1e-3)
            assert (np.array(one["psnr"]) > predicted["psnr"]).all()
        assert [one["share"] for one in aligned] == sorted(one["share"] for one in aligned)


def test_share_of_a_step_on_paper():
    """From 0.9 to 0.8: the velocity counts 0.1 / 0.2, of the 0.9 that it counts in a step all the way."""
    made = align.Recovered(0.9, 0.1, {}, None)
    assert made.weight == pytest.approx(0.5)
    assert made.share == pytest.approx(0.5 / 0.9)
    assert align.Recovered(0.9, 0.9, {}, None).share == pytest.approx(1)
    assert align.Recovered(0.9, None, {}, None).share == 1


def test_training_length_is_the_published_one():
    published = load_run("miniature", ["align.range_start=5", "align.range_end=25"])
    assert align.training_length(published) == pytest.approx(0.0215, abs=1e-4)


def test_levels_out_of_range_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--levels"):
        align.check_align("miniature", [], tmp_path, 1, [0.9, 1.0])


def test_first_crossing():
    steps = [0, 4, 8, 12]
    assert inversion.first_crossing(steps, [1.0, 0.9, 0.7, 0.8], 0.8) == 8
    assert inversion.first_crossing(steps, [0.2, 0.9, 1.1, 1.2], 1.0, below=False) == 8
    assert inversion.first_crossing(steps, [1.0, 0.9, 0.8, 0.8], 0.8) is None, "at the level is not beyond it"


def test_content_crossing_counts_from_the_base():
    steps, content = [0, 4, 8, 12, 16], [0.95, 0.94, 0.93, 0.92, 0.80]
    assert inversion.content_crossing(steps, content, 0.02) == 12
    assert inversion.content_crossing(steps, content, 0.10) == 16
    assert inversion.content_crossing(steps, content, 0.20) is None


def made_up(arm, content, relative):
    """Two seeds and three prompts that all follow the same curve."""
    names = dict.fromkeys((*inversion.MEASURES, "texture", "light"), np.linspace(0, 1.2, len(content)))
    curves = names | {"content": np.array(content), "relative": np.array(relative)}
    scores = {name: np.broadcast_to(values[None, :, None], (2, len(content), 3)) for name, values in curves.items()}
    return inversion.Curves(arm, [4 * i for i in range(len(content))], scores, np.zeros((2, len(content))))


def test_over_optimisation_is_told_from_made_up_curves(tmp_path):
    kept = made_up("both branches", [0.9, 0.9, 0.89, 0.9], [0, 0.1, 0.2, 0.25])
    lost = made_up("denoise only", [0.9, 0.85, 0.7, 0.5], [0, 0.2, 0.4, 0.6])
    rows = [inversion.summary_row(curves) for curves in (kept, lost)]
    assert [row["content 2 points down: step"] for row in rows] == ["never", 4]
    assert [row["content 10 points down: step"] for row in rows] == ["never", 8]
    assert rows[1]["content 10 points down: relative reward then its highest"] is True
    assert "look at 12" in rows[1]["look beyond the liked side"]
    assert "content -0.400 [-0.400, -0.400]" in inversion.inversion_finding([kept, lost])
    assert len(inversion.step_rows([kept, lost])) == 8
    side_by_side = {row["quantity"]: row for row in inversion.summary_rows([kept, lost])}
    assert side_by_side["content 2 points down: step"]["denoise only"] == 4
    inversion.draw_curves([kept, lost], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_claims_replace_those_of_their_name(tmp_path):
    method_check.record_claims(tmp_path, [{"name": "inversion", "rows": []}, {"name": "align", "rows": []}])
    path = method_check.record_claims(tmp_path, [{"name": "align", "rows": [{"sigma": 0.5}]}])
    claims = json.loads(path.read_text())["claims"]
    assert [claim["name"] for claim in claims] == ["align", "inversion"]
    assert claims[0]["rows"]


@needs_weights
def test_the_report_shows_the_claims(measured, tmp_path):
    from fake_runs import make_run

    run = make_run(tmp_path / "run")
    for name in ("method_check.json", "align.png"):
        (run / name).write_bytes((measured[0] / name).read_bytes())
    page = write_report([run]).read_text(encoding="utf-8")
    assert page.count('class="claim"') == 2
    assert "Direct-Align against one-step prediction" in page
