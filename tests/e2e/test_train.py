"""The real command under the real launcher: it trains, exports, and ends as it should, in every way it can end."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.e2e.launch import alone, run, started, torchrun
from tests.unit.train import material

CONFIG = """
run_dir = "run"
[model]
tokenizer = "tokenizer"
[model.config]
{model}
[data]
files = ["data.jsonl"]
seq_len = 32
[training]
total_steps = 6
device = "cpu"
[optimizer]
lr = 3e-3
[export]
hf_interval = 2
hf_max_keep = 2
"""

HOOKS = """
import json, os
from pathlib import Path
from stillframe.train.hooks import Hook

class Tells(Hook):
    def after_hf_export(self, path, step, epoch, total_step, total_epoch):
        names = sorted(entry.name for entry in path.iterdir())
        line = json.dumps([path.name, step, epoch, total_step, total_epoch, names])
        with open(f"hooks-{os.environ.get('RANK', '0')}.jsonl", "a") as file:
            file.write(line + "\\n")

class Fails(Hook):
    def after_train_step(self, step):
        if step == 3 and self.trainer.ranks.rank == 1:
            raise RuntimeError("rank 1 has had enough")
"""

LOAD_PLAINLY = """
import sys
sys.modules["stillframe"] = None
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model, loading = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
output = model.generate(**tokenizer("Document", return_tensors="pt"), max_new_tokens=4, do_sample=False)
print(json.dumps({"keys": [sorted(map(str, keys)) for keys in loading.values()], "tokens": output.shape[1]}))
"""


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    """A folder with everything that a run needs."""
    material.table(tmp_path)
    model = "\n".join(f"{name} = {json.dumps(value)}" for name, value in material.QWEN3_MOE.items())
    (tmp_path / "config.toml").write_text(CONFIG.format(model=model))
    (tmp_path / "user_hooks.py").write_text(HOOKS)
    return tmp_path


def test_two_ranks_train_export_and_the_export_is_usable(work_dir: Path) -> None:
    command = torchrun(2, "train", "config.toml", "--set", 'hooks=["user_hooks:Tells"]')
    ended = run(command, work_dir=work_dir, PYTHONPATH=str(work_dir))
    assert ended.status == 0, ended.stderr
    assert "step 6/6" in ended.stdout
    assert "hf-6 published" in ended.stdout

    run_dir = work_dir / "run"
    assert {path.name for path in run_dir.iterdir()} == {"hf-4", "hf-6", "hf-latest", "metrics.jsonl", "run.json"}
    assert (run_dir / "hf-latest").readlink() == Path("hf-6")
    heard = [(work_dir / f"hooks-{rank}.jsonl").read_text() for rank in range(2)]
    assert heard[0] == heard[1]
    calls = [json.loads(line) for line in heard[0].splitlines()]
    assert [call[:4] for call in calls] == [[f"hf-{step}", step, 1, 6] for step in (2, 4, 6)]
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert all(files <= set(call[5]) for call in calls)

    loaded = run([sys.executable, "-c", LOAD_PLAINLY, "run/hf-latest"], work_dir=work_dir)
    assert loaded.status == 0, loaded.stderr
    facts = json.loads(loaded.stdout)
    assert not any(facts["keys"])
    assert facts["tokens"] == len("Document") + 4

    listed = run(alone("list", "run"), work_dir=work_dir)
    assert (listed.status, listed.stderr) == (0, "")
    assert [line.split()[:3] for line in listed.stdout.splitlines()[1:]] == [["hf-4", "hf", "4"], ["hf-6", "hf", "6"]]


def test_one_process_trains_without_a_launcher(work_dir: Path) -> None:
    ended = run(alone("train", "config.toml", "--set", "training.total_steps=2"), work_dir=work_dir)
    assert (ended.status, ended.stderr) == (0, "")
    assert (work_dir / "run" / "hf-2" / "model.safetensors").is_file()


def test_an_exception_on_one_rank_ends_the_job_with_it(work_dir: Path) -> None:
    command = torchrun(2, "train", "config.toml", "--set", 'hooks=["user_hooks:Fails"]')
    ended = run([*command, "--set", "training.total_steps=1000000"], work_dir=work_dir, PYTHONPATH=str(work_dir))
    assert ended.status == 1
    assert "RuntimeError: rank 1 has had enough" in ended.stderr


def test_an_interrupt_ends_the_process_at_once(work_dir: Path) -> None:
    command = alone("train", "config.toml", "--set", "training.total_steps=1000000")
    with started(command, work_dir=work_dir) as process:
        assert process.stdout is not None
        assert any(re.match("step +3/", line) for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()  # bounded by the watchdog
    assert process.returncode == 130
    assert stderr == "stillframe train: interrupted\n"


def test_bad_configuration_is_one_line_and_status_2(work_dir: Path) -> None:
    ended = run(alone("train", "config.toml", "--set", "training.total_step=2"), work_dir=work_dir)
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.startswith(
        "stillframe train: error: --set 'training.total_step=2': training.total_step: unknown"
    )
    assert ended.stderr.count("\n") == 1


def test_bad_data_is_one_line_for_all_ranks_of_a_host(work_dir: Path) -> None:
    (work_dir / "data.jsonl").write_text("no JSON\n")
    ended = run(torchrun(2, "train", "config.toml"), work_dir=work_dir)
    assert ended.status != 0
    lines = [line for line in ended.stderr.splitlines() if "stillframe train: error:" in line]
    assert len(lines) == 1
    assert lines[0].startswith("stillframe train: error: data.files: data.jsonl line 1 is not JSON")
    assert "in train\n" not in ended.stderr  # no traceback of ours; torchrun prints its own
