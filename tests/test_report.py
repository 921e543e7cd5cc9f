"""The report page: what it reads of a run folder, what it says of it, and that it stands alone."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from fake_runs import make_run, picture
from PIL import Image

from srpo_core.config import ConfigError
from srpo_core.intervals import Interval
from srpo_core.report import write_report
from srpo_core.report.charts import Series, interval_decimals, line_chart, nice_ticks, number, stacked_chart
from srpo_core.report.compare import changes, measure_order
from srpo_core.report.data import PairedScores, read_run
from srpo_core.report.gallery import spread
from srpo_core.report.pictures import embed

VOID = {"meta", "img", "br", "link"}


class Checker(HTMLParser):
    """Collects text and addresses; complains about tags that don't match."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.addresses = [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def page_of(*runs, out=None):
    path = write_report(runs, out)
    page = path.read_text(encoding="utf-8")
    return page, " ".join(" ".join(Checker(page).text).split())


def test_a_finished_run(tmp_path):
    run = make_run(tmp_path / "run", steps=40, prompts=12)
    _, text = page_of(run)
    assert (run / "report.html").is_file()
    for part in (
        "Look",
        "clear rise",
        "Before and after",
        "What changed",
        "Score per branch",
        "Seconds per step",
        "Settings",
    ):
        assert part in text
    assert "all 12 held-out prompts" in text
    assert "a red ball on the left in a meadow, 0" in text
    assert "settings differ from the defaults" in text or "settings differ from preset" in text
    assert "2.13.0" in text
    assert "not finished" not in text
    evaluation = read_run(run).evaluation
    rise = np.mean(evaluation.after["look"]) - np.mean(evaluation.before["look"])
    assert f"+{rise:.3f}" in text


def test_the_page_needs_nothing_else(tmp_path):
    page, _ = page_of(make_run(tmp_path / "run"))
    assert all(address.startswith("data:") for address in Checker(page).addresses)
    assert "<script" not in page
    assert not re.search(r"url\(|@import|https?://", page)
    assert "prefers-color-scheme: dark" in page


def test_text_from_files_is_escaped(tmp_path):
    run = make_run(tmp_path / "<b>run</b>")
    path = run / "evaluation" / "evaluation.json"
    data = json.loads(path.read_text())
    data["prompts"][0] = '<script>alert("x")</script>'
    path.write_text(json.dumps(data))
    page, text = page_of(run)
    assert "<script" not in page
    assert '<script>alert("x")</script>' in text


def test_control_words_and_a_mixture_have_their_place(tmp_path):
    run = make_run(tmp_path / "run", words=True, mixed=("hpsv2", "pickscore"), steps=20)
    page, text = page_of(run)
    assert "Control words" in text and "Oil (disliked)" in text and "Real (liked)" in text
    assert "Realism (SGP)" in text and "Realism (SGP)" in text.split("Before and after")[0]  # in the headline
    assert 'class="cards six"' in page
    assert "Score per branch: pickscore" in text and "Reward of the preferred wording: hpsv2" in text
    assert "Previews: oil" not in text.lower()  # no chart for each word
    main_table = text.split("What changed")[1].split("Control words")[0]
    assert "pickscore" in main_table and "Oil" not in main_table
    by_name = {change.name: change for change in changes([read_run(run).evaluation])}
    assert by_name["word:Real"].verdict == "clear rise" and by_name["word:Oil"].verdict == "clear fall"
    assert by_name["sgp"].effect.low > 0


def test_runs_without_control_words_read_as_before(tmp_path):
    page, text = page_of(make_run(tmp_path / "run"))
    assert 'id="words"' not in page and "Realism" not in text
    assert 'class="cards">' in page


def test_several_runs_share_a_chart_of_control_words(tmp_path):
    runs = [make_run(tmp_path / f"seed-{seed}", seed=seed, words=True, evaluation=seed < 2) for seed in range(3)]
    _, text = page_of(*runs, out=tmp_path / "all.html")
    assert "seed-2, disliked" in text and "means over words" in text


@pytest.mark.parametrize("previews", [True, False])
def test_an_unfinished_run(tmp_path, previews):
    run = make_run(tmp_path / "run", steps=20, of=60, evaluation=False, previews=previews)
    _, text = page_of(run)
    assert "not finished (step 20 of 60)" in text
    if previews:
        assert "the numbers compare the previews of step 0 and step 20" in text
        assert "too few for intervals" in text  # three preview prompts
        assert "95% CI [" not in text
    else:
        assert "Nothing to compare yet" in text
        assert "There are no previews here" in text


def test_a_run_that_has_only_begun(tmp_path):
    run = make_run(tmp_path / "run", steps=5, evaluation=False, previews=False)
    (run / "metrics.jsonl").unlink()
    _, text = page_of(run)
    assert "no step logged yet" in text
    assert "metrics.jsonl holds no steps yet" in text


def test_several_runs_are_pooled(tmp_path):
    runs = [make_run(tmp_path / f"seed-{seed}", seed=seed) for seed in range(3)]
    _, text = page_of(*runs, out=tmp_path / "all.html")
    assert (tmp_path / "all.html").is_file()
    assert "12 held-out prompts in each of 3 runs" in text
    assert "pooled by a bootstrap over runs and prompts" in text
    assert "seed-1, inversion" in text
    assert "What differs between the runs" in text


def test_runs_with_different_numbers_of_prompts_stay_apart(tmp_path):
    runs = [make_run(tmp_path / f"{count}", prompts=count) for count in (8, 12)]
    _, text = page_of(*runs)
    assert "are not pooled" in text and "Nothing to compare" not in text
    assert "Look, 12" in text
    assert "all held-out prompts" in text and "all 8 held-out" not in text


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / parent / "run") for parent in ("a", "b")]
    assert "a/run, b/run" in page_of(*runs)[1]


def test_the_page_goes_into_a_folder_too(tmp_path):
    mixture = {"name": "hpsv2", "more": [{"name": "pickscore"}]}
    run = make_run(tmp_path / "run", evaluation=False, previews=False, reward=mixture)
    (tmp_path / "pages").mkdir()
    text = page_of(run, out=tmp_path / "pages")[1]
    assert (tmp_path / "pages" / "report.html").is_file()
    assert "reward hpsv2 + pickscore" in text
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out: "):
        write_report([run], tmp_path / "file" / "report.html")


def test_no_run_folder(tmp_path):
    with pytest.raises(ConfigError, match="no run folder"):
        write_report([tmp_path])


def test_damaged_files_become_notes(tmp_path):
    run = make_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = "{broken"
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4']))  # a last line half-written is no damage
    path = run / "evaluation" / "evaluation.json"
    data = json.loads(path.read_text())
    data["after"]["look"][2] = math.nan
    path.write_text(json.dumps(data))
    (run / "evaluation" / "after" / "001.png").write_bytes(b"no picture")
    (run / "previews" / "step-000010.json").write_text("[")
    _, text = page_of(run)
    assert "1 line of metrics.jsonl can't be read" in text
    assert "look lack a finite number" in text
    assert "step-000010.json can't be read" in text
    assert "picture missing" in text


def test_a_step_logged_twice_counts_once(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 9.5}\n')
    data = read_run(run)
    assert [line["step"] for line in data.steps] == [0, 1, 2, 3] or [line["step"] for line in data.steps] == [1, 2, 3]
    assert data.series("loss")[1][1] == 9.5


def test_method_check(tmp_path):
    run = make_run(tmp_path / "run")
    picture(run / "claim.png", np.random.default_rng(0), 64, 1.0)
    claims = [
        {"title": "Recovers", "finding": "2 < 4", "rows": [{"sigma": 0.9, "error": [0.1, 0.2]}], "image": "claim.png"},
        {"title": "No rows"},
    ]  # fmt: skip
    (run / "method_check.json").write_text(json.dumps({"claims": claims}))
    page, text = page_of(run)
    assert "Method check" in text
    assert "2 < 4" in text
    assert "[0.100, 0.200]" in text
    assert page.count('class="claim"') == 2


def test_pages_of_large_pictures_stay_small(tmp_path):
    run = make_run(tmp_path / "run", prompts=26, size=320, steps=10, previews=False)
    page, text = page_of(run)
    assert len(page) < 6_000_000
    assert "24 of 26 held-out prompts" in text
    assert "data:image/jpeg" in page


def test_embedding_keeps_small_pictures_as_they_are(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths[:2]:
        picture(path, np.random.default_rng(0), 32, 1.0)
    assert all(uri.startswith("data:image/png") for uri in embed(paths[:2], 100_000))
    with_missing = embed(paths, 100_000)
    assert with_missing[2] is None
    assert with_missing[0] is not None
    Image.new("RGB", (900, 600)).save(paths[2])
    assert sum(len(uri) for uri in embed(paths, 9_000)) < 9_100


def test_pooled_change_of_one_run_is_that_run():
    rng = np.random.default_rng(0)
    scores = PairedScores(
        [f"p{i}" for i in range(20)], {"x": rng.normal(size=20).tolist()}, {"x": rng.normal(1, 1, 20).tolist()}
    )
    (change,) = changes([scores])
    assert change.after - change.before == pytest.approx(change.difference.estimate)
    assert change.rose.estimate == np.mean(np.subtract(scores.after["x"], scores.before["x"]) > 0)
    (twice,) = changes([scores, scores])
    assert twice.difference.estimate == pytest.approx(change.difference.estimate)
    assert twice.rose == change.rose  # the same prompts again are no new evidence


def test_order_of_measures():
    names = ["reward", "relative", "relative/Oil", "texture", "look"]
    assert measure_order(names) == ["look", "relative", "relative/Oil", "reward", "texture"]
    names = ["reward", "reward:clip", "relative", "sgp", "word:Oil", "light"]
    assert measure_order(names) == ["relative", "sgp", "reward", "reward:clip", "word:Oil", "light"]


def test_numbers_for_readers():
    assert number(0.123456) == "0.123"
    assert number(-1234.5) == "−1234"
    assert number(-0.0001, 2) == "0.00"
    assert number(math.nan) == "–"
    assert interval_decimals(Interval(0.005, 0.0004, 0.0096)) == 4
    assert interval_decimals(Interval(0.36, 0.356, 0.364)) == 3


def test_ticks_cover_and_are_round():
    assert nice_ticks(0.03, 0.97) == [0, 0.25, 0.5, 0.75, 1]
    assert nice_ticks(5, 5)[0] < 5 < nice_ticks(5, 5)[-1]
    assert spread(64, 4) == [0, 21, 42, 63]
    assert spread(3, 6) == [0, 1, 2]


def test_charts_of_nothing_and_of_one_point():
    assert line_chart("empty", [Series("a", [], [])]) == ""
    assert stacked_chart("empty", [], {}) == ""
    assert "<circle" in line_chart("one", [Series("a", [1], [2.0])])
