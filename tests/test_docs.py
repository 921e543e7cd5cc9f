"""What the pages in docs/ say of settings, presets, commands and files, compared with what is so."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from srpo_core import cli
from srpo_core.catalogue import CATALOGUE
from srpo_core.config import RunConfig
from srpo_core.description import describe_fields, load_run, preset_names

DOCS = Path(__file__).resolve().parent.parent / "docs"
FROM_THE_SCRIPTS = DOCS / "from-the-published-scripts.md"
PAGES = sorted(DOCS.glob("*.md"))
SETTINGS = {name for name, *_ in describe_fields()}
COMMANDS = {"train", "plan", "sample", "score", "encode", "export", "download", "report", "doctor", "settings"}
SECTIONS = sorted({name.split(".")[0] for name in SETTINGS if "." in name})

FLAGS = [
    "data_json_path", "dataloader_num_workers", "train_batch_size", "num_latent_t", "image_p",
    "pretrained_model_name_or_path", "dit_model_name_or_path", "vae_model_path", "cache_dir", "ema_decay",
    "ema_start_step", "cfg", "precondition_outputs", "seed", "output_dir", "checkpointing_steps",
    "resume_from_checkpoint", "logging_dir", "max_train_steps", "gradient_accumulation_steps", "learning_rate",
    "lr_warmup_steps", "max_grad_norm", "gradient_checkpointing", "selective_checkpointing", "allow_tf32",
    "mixed_precision", "use_cpu_offload", "sp_size", "train_sp_batch_size", "fsdp_sharding_startegy",
    "lr_scheduler", "lr_num_cycles", "lr_power", "weight_decay", "master_weight_type", "h", "w", "t",
    "sampling_steps", "eta", "sampler_seed", "loss_coef", "ignore_last", "shift", "timestep_length",
    "groundtruth_ratio", "train_timestep", "discount_pos", "discount_inv", "vis_guidence", "train_guidence",
    "vis_sampling_step", "vis_size", "reward_model",
]  # fmt: skip
"""Arguments of the published training script."""


def tables(text):
    """The tables of a page: lists of rows, each {column title: cell}."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows:
            titles = [title.strip("`") for title in rows[0]]
            assert all(len(row) == len(titles) for row in rows), rows[0]
            found.append([dict(zip(titles, row, strict=True)) for row in rows[2:]])
            rows = []
    return found


def commands(text):
    """The commands of a page's code blocks and in its running text, continued lines joined, comments cut off."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)  # code in other languages
    blocks = re.findall(r"(?:^    .*\n)+", text.replace("\\\n", " "), re.MULTILINE)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return lines + re.findall(r"`(srpo [a-z][^`]+)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_exist(page):
    mentioned = set(re.findall(rf"`((?:{'|'.join(SECTIONS)})\.\w+)[`=]", page.read_text(encoding="utf-8")))
    assert mentioned
    assert mentioned <= SETTINGS


def test_values_in_tables_are_the_presets():
    checked = 0
    for row in (row for rows in tables(FROM_THE_SCRIPTS.read_text(encoding="utf-8")) for row in rows):
        setting = row.get("setting", "").strip("`")
        for preset in set(row) & set(preset_names()):
            value = load_run(preset)
            for part in setting.split("."):
                value = getattr(value, part)
            said = row[preset]
            if said == "yours":
                assert setting in {"model.path", "data.prompts"}
            elif said == "unset":
                assert value is None, setting
            else:
                checked += 1
                assert same(yaml.safe_load(said.strip("`")), value), (preset, setting)
    assert checked > 100


def same(said, value):
    """Whether a value as YAML reads it is a setting's; YAML 1.1 reads 5e-6 as text."""
    if isinstance(value, list | tuple):
        return len(said) == len(value) and all(map(same, said, value))
    return float(said) == value if isinstance(value, float) else said == value


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_understood(page):
    lines = commands(page.read_text(encoding="utf-8"))
    assert lines
    for line in lines:
        words = shlex.split(line)
        script = next((word for word in words if word.startswith("scripts/")), None)
        if script is not None:
            assert (DOCS.parent / script).is_file(), line
            if not script.endswith(".sh"):
                continue
            words = ["srpo", "train", *words[words.index(script) + 1 :]]
            line = shlex.join(words)
        if "srpo_core" in words:  # python -m srpo_core, under torchrun
            words = ["srpo", *words[words.index("srpo_core") + 1 :]]
        if words[0] != "srpo" or len(words) == 2 or re.search(r"\b[A-Z]{3,}\b", line):
            assert words[0] in {"export", "cd"} or words[1] in COMMANDS, line
            continue
        arguments = cli.parse(words[1:])
        if words[1] == "download":
            assert set(arguments.names) <= set(CATALOGUE), line
        elif words[1] in {"train", "sample", "encode"} and not arguments.source.startswith("runs/"):
            load_run(arguments.source, arguments.overrides)


def test_the_flags_cover_the_scripts():
    """Every flag of the published argument lists stands on the page."""
    text = FROM_THE_SCRIPTS.read_text(encoding="utf-8")
    missing = [flag for flag in FLAGS if not re.search(rf"`--{flag}[ `]", text)]
    assert not missing


def test_defaults_that_the_page_calls_published():
    """The defaults of config.py are the HPS recipe, so that a run without a preset is it too."""
    preset, default = load_run("flux-dev"), RunConfig()
    assert preset.align == default.align
    assert preset.rollout == default.rollout


def test_the_files_page_lists_the_catalogue():
    pages = tables((DOCS / "files.md").read_text(encoding="utf-8"))
    places, licences = (rows for rows in pages if "name" in rows[0])
    for row, more, entry in zip(places, licences, CATALOGUE.values(), strict=True):
        assert row["name"] == more["name"] == f"`{entry.name}`"
        assert row["setting"] == f"`{entry.setting}`"
        assert any(str(file.place).startswith(row["in ComfyUI: `models/..."].strip("`")) for file in entry.files)
        amount, unit = row["about"].split()
        assert float(amount) * {"GB": 1e9, "MB": 1e6}[unit] == pytest.approx(entry.size, rel=0.1)
        assert more["repository"] == f"[{entry.repository}](https://huggingface.co/{entry.repository})"
        assert more["licence"] == entry.licence
        assert more["gated"] == ("yes" if entry.gated else "no")
