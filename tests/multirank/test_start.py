"""Bad input to the constructor: one clear error that names the thing, on every rank alike, and nothing left behind."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

import stillframe
from stillframe.errors import (
    OptionError,
    RunDirectoryError,
    SaveFailed,
    SaveTimeout,
    StillframeError,
    UnsupportedModel,
    UnsupportedPlacement,
)
from stillframe.testing import Ranks, run_process, run_ranks
from stillframe.testing.models import tiny_qwen3, tiny_qwen3_moe, tiny_tokenizer
from tests.multirank.footprint import footprint, grown, listing

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
libc = ctypes.CDLL(None, use_errno=True)


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


class BrokenTokenizer:
    """Fails to save itself, as one does whose vocabulary file is gone."""

    def save_pretrained(self, directory: str) -> None:
        raise FileNotFoundError(2, "No such file or directory", "vocab.json")


class TokenizerThatWrites:
    """Writes one file, of a name of our choice."""

    def __init__(self, name: str) -> None:
        self.name = name

    def save_pretrained(self, directory: str) -> None:
        path = Path(directory) / self.name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")


def on_meta() -> Any:
    with torch.device("meta"):
        return tiny_qwen3()


def with_attribute(name: str, value: object) -> Any:
    model = tiny_qwen3()
    setattr(model, name, value)
    return model


def with_bad_generation_config() -> Any:
    model = tiny_qwen3()
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.5  # means nothing without sampling, so that transformers refuses to save it
    return model


def strided_twice() -> Any:
    model = tiny_qwen3()
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))
    placements = [_StridedShard(0, split_factor=2), _StridedShard(0, split_factor=2)]
    norm = model.model.norm
    shard = norm.weight.detach().chunk(2)[this_rank()]
    norm.weight = nn.Parameter(DTensor.from_local(shard, mesh, placements, run_check=False))
    return model


@contextmanager
def small_files(rank: int) -> Any:
    """This rank may make no file of more than 100,000 bytes, shared memory included."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if this_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def no_python(rank: int) -> Any:
    """A Python started from this rank does not find its standard library, and ends at once."""
    if this_rank() == rank:
        os.environ["PYTHONHOME"] = "/nonexistent"
    yield
    os.environ.pop("PYTHONHOME", None)


@dataclass(frozen=True)
class Case:
    """One bad input: how a rank gets it, and what all ranks must raise."""

    name: str
    cls: type[Exception]
    said: str
    model: Callable[[], Any] = tiny_qwen3
    arguments: Callable[[], dict[str, Any]] = dict
    run_dir: str = "run"
    around: Callable[[], AbstractContextManager[None]] = nullcontext


def only_rank(rank: int, bad: Callable[[], Any], good: Callable[[], Any] = tiny_qwen3) -> Callable[[], Any]:
    return lambda: bad() if this_rank() == rank else good()


CASES = [
    Case("parent is a file", RunDirectoryError, "cannot create the run directory .*/file/run: ", run_dir="file/run"),
    Case("run directory is a file", RunDirectoryError, "cannot create the run directory .*/file: ", run_dir="file"),
    Case("read-only", RunDirectoryError, "cannot .* run directory .*/read-only: Read-only file", run_dir="read-only"),
    Case("name too long", RunDirectoryError, "cannot create .*: File name too long", run_dir="x" * 300),
    Case(
        "no transformers model",
        UnsupportedModel,
        "Linear is not a transformers PreTrainedModel",
        lambda: nn.Linear(2, 2),
    ),
    Case("no model", UnsupportedModel, r"NoneType is not a torch\.nn\.Module", lambda: None),
    Case("meta device", UnsupportedModel, r"Qwen3ForCausalLM: \d+ parameters have no values yet .*such as ", on_meta),
    Case("meta device on rank 1", UnsupportedModel, "parameters have no values yet", only_rank(1, on_meta)),
    Case("quantized", UnsupportedModel, "is quantized", lambda: with_attribute("hf_quantizer", object())),
    Case(
        "no adapters",
        UnsupportedModel,
        "says that it carries PEFT adapters, but has none",
        lambda: with_attribute("_hf_peft_config_loaded", True),
    ),
    Case(
        "offloaded", UnsupportedModel, "offloaded modules", lambda: with_attribute("hf_device_map", {"model": "disk"})
    ),
    Case(
        "generation config",
        UnsupportedModel,
        "the config of Qwen3ForCausalLM cannot be saved",
        with_bad_generation_config,
    ),
    Case(
        "strided twice", UnsupportedPlacement, r"model\.norm\.weight: two _StridedShard on dimension 0", strided_twice
    ),
    Case(
        "other model on rank 1",
        SaveFailed,
        r"rank 1 has another layout than rank 0.* differently: one that follows model\.norm\.weight",
        only_rank(1, lambda: tiny_qwen3(tied=False)),
    ),
    Case(
        "other dtype on rank 1",
        SaveFailed,
        r"rank 1 has another layout.* differently: model\.embed_tokens\.weight",
        only_rank(1, lambda: tiny_qwen3(dtype=torch.bfloat16)),
    ),
    Case(
        "other options on rank 1",
        SaveFailed,
        r"rank 1 has another layout than rank 0.* differently: model\.embed_tokens\.weight",
        arguments=lambda: {"save_dtype": "bfloat16" if this_rank() == 1 else None},
    ),
    Case(
        "another name of a later key on rank 1",
        SaveFailed,
        r"rank 1 has another layout than rank 0.* differently: model\.layers\.0\.mlp\.experts\.gate_up_proj",
        tiny_qwen3_moe,
        lambda: {"key_mapping": {r"experts\.2\.up_proj": "experts.2.above"} if this_rank() == 1 else {}},
    ),
    Case(
        "tokenizer fails",
        UnsupportedModel,
        "the BrokenTokenizer cannot be saved: FileNotFoundError: .*vocab.json",
        arguments=lambda: {"tokenizer": BrokenTokenizer()},
    ),
    Case(
        "tokenizer fails on rank 0",
        UnsupportedModel,
        "the BrokenTokenizer cannot be saved",
        arguments=lambda: {"tokenizer": BrokenTokenizer() if this_rank() == 0 else tiny_tokenizer()},
    ),
    Case(
        "tokenizer is a path", UnsupportedModel, "the str cannot be saved", arguments=lambda: {"tokenizer": "/some/dir"}
    ),
    Case(
        "tokenizer takes a weights file's name",
        UnsupportedModel,
        "saves a file 'model.safetensors",
        arguments=lambda: {"tokenizer": TokenizerThatWrites("model.safetensors")},
    ),
    Case(
        "tokenizer writes an index beside the one file of weights",
        UnsupportedModel,
        "saves a file 'model.safetensors.index.json",
        arguments=lambda: {"tokenizer": TokenizerThatWrites("model.safetensors.index.json")},
    ),
    Case(
        "tokenizer writes one file of weights beside shards",
        UnsupportedModel,
        "saves a file 'model.safetensors', a name that is taken",
        arguments=lambda: {"tokenizer": TokenizerThatWrites("model.safetensors"), "max_shard_size": "50KB"},
    ),
    Case(
        "tokenizer takes the manifest's name",
        UnsupportedModel,
        "saves a file 'stillframe.json",
        arguments=lambda: {"tokenizer": TokenizerThatWrites("stillframe.json")},
    ),
    Case(
        "tokenizer takes the work directory's name",
        UnsupportedModel,
        "saves a file '.stillframe/",
        arguments=lambda: {"tokenizer": TokenizerThatWrites(".stillframe/receipt-00000.json")},
    ),
    Case(
        "no memory on rank 1",
        StillframeError,
        r"cannot allocate \d+ bytes of shared memory for this rank's snapshot: File too",
        around=lambda: small_files(1),
    ),
    Case("no writer on rank 1", SaveFailed, "writer process .* ended with status 1", around=lambda: no_python(1)),
    Case("no writer on rank 0", SaveFailed, "writer process .* ended with status 1", around=lambda: no_python(0)),
    Case(
        "no such shard size",
        OptionError,
        "max_shard_size must be .*'5 gigs'",
        arguments=lambda: {"max_shard_size": "5 gigs"},
    ),
    Case("nothing kept", OptionError, "hf_max_keep must be .*not 0", arguments=lambda: {"hf_max_keep": 0}),
    Case("no time", OptionError, "save_timeout_s must be .*not 0", arguments=lambda: {"save_timeout_s": 0}),
]


@dataclass(frozen=True)
class Outcome:
    error: Exception | None
    left: dict[str, int]
    files: list[str]


def settled_footprint(base_dir: Path) -> Counter[str]:
    """This process's footprint, when all that is loaded or started once already is."""
    with stillframe.Checkpointer(base_dir / "first", model=tiny_qwen3()):
        pass
    return footprint()


def go_through(base_dir: Path, cases: list[int]) -> list[Outcome]:
    """Each case on this rank, one after the other; at the end everything must still work."""
    settled_footprint(base_dir)
    outcomes = []
    for case in (CASES[index] for index in cases):
        model, arguments = case.model(), case.arguments()
        before = footprint()
        error: Exception | None = None
        with case.around():
            try:
                options = {"save_timeout_s": 60.0} | arguments
                stillframe.Checkpointer(base_dir / case.run_dir, model=model, **options).close()
            except Exception as caught:  # noqa: BLE001  # it is the outcome
                error = caught.with_traceback(None)
        barrier()
        outcomes.append(Outcome(error, grown(before), listing(base_dir / case.run_dir)))
        barrier()
    with stillframe.Checkpointer(base_dir / "run", model=tiny_qwen3()) as ckpt:
        ckpt.save_hf(1)
    return outcomes


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory, mount_tmpfs: Callable[[str], Path]) -> Path:
    """Where the run directories of the cases are: one of them a file, one a file system that cannot be written."""
    directory = tmp_path_factory.mktemp("start")
    (directory / "file").write_text("mine")
    (directory / "read-only").symlink_to(mount_tmpfs("ro"))
    return directory


@pytest.fixture(scope="module")
def on_two_ranks(base_dir: Path) -> list[list[Outcome]]:
    return run_ranks(2, go_through, base_dir, list(range(len(CASES))))


def check(case: Case, outcome: Outcome) -> None:
    error = outcome.error
    assert type(error) is case.cls, error
    assert re.search(case.said, str(error)), error
    assert outcome.left == {}, outcome.left
    assert outcome.files == []


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
def test_bad_input_is_one_error_on_every_rank_and_leaves_nothing(
    on_two_ranks: list[list[Outcome]], base_dir: Path, index: int
) -> None:
    for outcomes in on_two_ranks:
        check(CASES[index], outcomes[index])
    assert (base_dir / "file").read_text() == "mine"


ALONE_NAMES = ("parent is a file", "read-only", "meta device", "tokenizer fails", "nothing kept")
ALONE = [index for index, case in enumerate(CASES) if case.name in ALONE_NAMES]


@pytest.fixture(scope="module")
def alone(base_dir: Path) -> list[Outcome]:
    shutil.rmtree(base_dir / "run", ignore_errors=True)
    return run_process(go_through, base_dir, ALONE)


@pytest.mark.parametrize("index", ALONE, ids=[CASES[index].name for index in ALONE])
def test_bad_input_to_a_single_process_is_the_same_error(alone: list[Outcome], index: int) -> None:
    check(CASES[index], alone[ALONE.index(index)])


# Ranks that do not come, or do not see what rank 0 sees


@contextmanager
def expecting(cls: type[Exception], said: str) -> Any:
    """In a rank: the exception of exactly this class, and words."""
    with pytest.raises(cls, match=said) as caught:
        yield
    assert type(caught.value) is cls


def leave_out(run_dir: Path, absent: int) -> dict[str, int]:
    model = tiny_qwen3()
    before = footprint()
    if this_rank() != absent:
        # Rank 0 alone knows who did not come; where it is rank 0 itself, the others know that.
        said = f"rank {absent} did not come within 1 s" if absent else r"rank \d waited \d+ s for rank 0"
        with expecting(SaveTimeout, said):
            stillframe.Checkpointer(run_dir, model=model, save_timeout_s=1)
    left = grown(before)
    dist.barrier()
    # Next time all come, and nothing is mixed up with the time before.
    if this_rank() == absent:
        with expecting(SaveTimeout, "did not come|waited"):
            stillframe.Checkpointer(run_dir, model=model, save_timeout_s=1)
    dist.barrier()
    with stillframe.Checkpointer(run_dir, model=model, save_timeout_s=60) as ckpt:
        ckpt.save_hf(1)
    return left


@pytest.mark.parametrize(("world_size", "absent"), [(2, 1), (3, 2), (2, 0)])
def test_a_rank_that_makes_no_checkpointer_is_named(tmp_path: Path, world_size: int, absent: int) -> None:
    assert run_ranks(world_size, leave_out, tmp_path / "run", absent) == [{}] * world_size
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["hf-1", "hf-latest", "run.json"]


def die_in_the_middle(run_dir: Path) -> None:
    model = tiny_qwen3()
    if this_rank() == 1:
        model.named_parameters = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # the layout asks for them
    with expecting(SaveTimeout, "start of the Checkpointer failed on rank 1 .*: rank 1 did not report within 3 s"):
        stillframe.Checkpointer(run_dir, model=model, save_timeout_s=3)
    assert listing(run_dir) == []


def test_a_rank_that_dies_in_the_constructor_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    with Ranks(2, die_in_the_middle, tmp_path / "run") as ranks:
        survived, died = ranks.outcomes()
    assert survived.failure is None, survived.failure
    assert died.failure is not None
    assert died.failure.reason == "killed by SIGKILL"


def isolate(flag: int, what: str) -> str | None:
    """Give this process a namespace of its own; what keeps it from that, if anything does."""
    if libc.unshare(flag) != 0:
        return f"{what} cannot be unshared here: {os.strerror(ctypes.get_errno())}"
    return None


def see_another_file_system(run_dir: Path) -> str | None:
    problem = None
    if this_rank() == 1:
        problem = isolate(CLONE_NEWNS, "the mount table")
        for command in (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "none", str(run_dir)]):
            if problem is None and subprocess.run(command, timeout=30, check=False).returncode != 0:
                problem = f"{command} is not permitted here"
    problems: list[str | None] = [None, None]
    dist.all_gather_object(problems, problem)
    if problems[1] is not None:
        return problems[1]
    model = tiny_qwen3()
    before = settled_footprint(run_dir.parent)
    with expecting(RunDirectoryError, "is not the directory that rank 0 sees there; .* that all ranks share"):
        stillframe.Checkpointer(run_dir, model=model, save_timeout_s=60)
    left = grown(before)
    assert left == {}, left
    assert listing(run_dir) == []
    return None


def test_a_rank_that_sees_another_file_system_is_told_before_anything_is_saved(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for problem in run_ranks(2, see_another_file_system, tmp_path / "run"):
        if problem is not None:
            pytest.skip(problem)
    assert listing(tmp_path / "run") == []


def be_out_of_reach(run_dir: Path) -> str | None:
    problems: list[str | None] = [None, None]
    model = tiny_qwen3()
    before = settled_footprint(run_dir.parent)
    dist.all_gather_object(problems, isolate(CLONE_NEWNET, "the network") if this_rank() == 1 else None)
    if problems[1] is not None:
        return problems[1]
    with expecting(StillframeError, "rank 1 cannot reach rank 0's store at 127.0.0.1:.*; pass store_host"):
        stillframe.Checkpointer(run_dir, model=model, save_timeout_s=2, store_host="127.0.0.1")
    with expecting(StillframeError, "rank 0 cannot listen on an address of its own .*198.51.100.1.*; pass store_host"):
        # An address for documentation (RFC 5737), which no host has.
        stillframe.Checkpointer(run_dir, model=model, save_timeout_s=60, store_host="198.51.100.1")
    left = grown(before)
    assert left == {}, left
    return None


def test_a_rank_that_cannot_reach_the_store_is_named_on_all_ranks(tmp_path: Path) -> None:
    for problem in run_ranks(2, be_out_of_reach, tmp_path / "run"):
        if problem is not None:
            pytest.skip(problem)
    assert listing(tmp_path / "run") == []
