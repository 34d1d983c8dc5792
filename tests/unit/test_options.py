"""Options: every illegal value is refused with its name, before anything is made."""

from __future__ import annotations

import contextlib
import decimal
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.serialization._base import parse_size_to_int
from hypothesis import example, given
from hypothesis import strategies as st

from stillframe.errors import OptionError
from stillframe.options import CheckpointerOptions, run_directory
from stillframe.policies import KeepAll, KeepEvery, KeepLast, Retention, RetentionPolicy

RUN = Path("/run")


def with_size(size: Any) -> int:
    return CheckpointerOptions(run_dir=RUN, max_shard_size=size).max_shard_bytes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("run_dir", "runs/demo"),
        ("run_dir", None),
        ("max_shard_size", 0),
        ("max_shard_size", -1),
        ("max_shard_size", True),
        ("max_shard_size", 5e9),
        ("max_shard_size", None),
        ("max_shard_size", ""),
        ("max_shard_size", "5"),
        ("max_shard_size", "GB"),
        ("max_shard_size", "0GB"),
        ("max_shard_size", "0.0001KB"),
        ("max_shard_size", "-5GB"),
        ("max_shard_size", "5GiB"),
        ("max_shard_size", "5 G B"),
        ("max_shard_size", "5\u212aB"),  # the Kelvin sign is a K in another case
        ("max_shard_size", "٥GB"),
        ("max_shard_size", "9" * 400 + "GB"),  # no float holds it
        ("save_dtype", "float8_e4m3fn"),
        ("save_dtype", "fp16"),
        ("hf_max_keep", 0),
        ("hf_max_keep", -2),
        ("hf_max_keep", True),
        ("hf_max_keep", 1.5),
        ("hf_max_keep", "3"),
        ("checkpoint_maxkeep", 0),
        ("checkpoint_maxkeep", -2),
        ("checkpoint_maxkeep", False),
        ("keep_hf", 3),
        ("keep_hf", KeepLast),
        ("keep_checkpoints", (KeepLast(3),)),
        ("key_mapping", ["a"]),
        ("key_mapping", "a"),
        ("on_failure", "ignore"),
        ("on_failure", None),
        ("on_export_failure", ["raise"]),
        ("hf_export", None),
        ("save_frozen", 1),
        ("publish_together", "yes"),
        ("save_timeout_s", 0),
        ("save_timeout_s", -1.0),
        ("save_timeout_s", True),
        ("save_timeout_s", None),
        ("save_timeout_s", "60"),
        ("save_timeout_s", float("nan")),
        ("save_timeout_s", float("inf")),
        ("save_timeout_s", 10**7),
        ("save_timeout_s", decimal.Decimal(60)),
        ("store_host", 29500),
        ("store_host", b"localhost"),
    ],
)
def test_an_illegal_option_is_refused_by_name_and_value(name: str, value: Any) -> None:
    options: dict[str, Any] = {"run_dir": RUN, name: value}
    with pytest.raises(OptionError) as caught:
        CheckpointerOptions(**options)
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"layers.(": "x"}, r"'layers\.\(': 'x', which re\.sub refuses: missing \)"),
        ({"a": r"\1"}, r"which re\.sub refuses: invalid group reference 1"),
        ({"a": r"\g<n>"}, "which re.sub refuses: unknown group name 'n'"),
        ({"a": None}, "maps text to text, not 'a' to None"),
        ({b"a": "b"}, "maps text to text, not b'a' to 'b'"),
    ],
)
def test_a_mapping_that_cannot_be_applied_is_refused_by_rule(mapping: dict[Any, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"key_mapping .*{message}"):
        CheckpointerOptions(run_dir=RUN, key_mapping=mapping)


def test_without_exports_there_are_no_keys_to_map() -> None:
    with pytest.raises(OptionError, match="key_mapping has no effect with hf_export=False"):
        CheckpointerOptions(run_dir=RUN, hf_export=False, key_mapping={})


@pytest.mark.parametrize(("number", "rule"), [(None, KeepAll()), (-1, KeepAll()), (1, KeepLast(1)), (3, KeepLast(3))])
def test_a_number_to_keep_is_a_rule(number: int | None, rule: RetentionPolicy) -> None:
    for_exports = CheckpointerOptions(run_dir=RUN, hf_max_keep=number, checkpoint_maxkeep=7).retention
    assert for_exports == Retention(exports=rule, checkpoints=KeepLast(7))
    for_checkpoints = CheckpointerOptions(run_dir=RUN, checkpoint_maxkeep=number).retention
    assert for_checkpoints == Retention(exports=KeepAll(), checkpoints=rule)


def test_a_rule_stands_for_itself() -> None:
    rule = KeepLast(2) | KeepEvery(100)
    options = CheckpointerOptions(run_dir=RUN, keep_hf=KeepEvery(7), keep_checkpoints=rule)
    assert options.retention == Retention(exports=KeepEvery(7), checkpoints=rule)


@pytest.mark.parametrize("number", [-1, 1])
@pytest.mark.parametrize(
    ("number_name", "rule_name"), [("hf_max_keep", "keep_hf"), ("checkpoint_maxkeep", "keep_checkpoints")]
)
def test_a_number_and_a_rule_are_one_too_many(number: int, number_name: str, rule_name: str) -> None:
    options: dict[str, Any] = {number_name: number, rule_name: KeepLast(2)}
    with pytest.raises(OptionError, match=f"{number_name}={number} and {rule_name} are two ways"):
        CheckpointerOptions(run_dir=RUN, **options)


@pytest.mark.parametrize("name", ["hf_max_keep", "checkpoint_maxkeep"])
def test_keeping_none_is_refused_with_what_there_is_instead(name: str) -> None:
    options: dict[str, Any] = {name: 0}
    with pytest.raises(OptionError, match=f"{name} must be .*not 0: the newest always stays, and 1 keeps it alone"):
        CheckpointerOptions(run_dir=RUN, **options)


def test_without_exports_nothing_can_be_published_together() -> None:
    assert CheckpointerOptions(run_dir=RUN, hf_export=False).publish_together is False
    with pytest.raises(OptionError, match="publish_together has no effect with hf_export=False"):
        CheckpointerOptions(run_dir=RUN, hf_export=False, publish_together=True)


@pytest.mark.parametrize(
    ("size", "size_bytes"),
    [("5GB", 5 * 10**9), ("50KB", 50_000), ("1.5 mb", 1_500_000), (" .5TB ", 5 * 10**11), ("0.001KB", 1), (7, 7)],
)
def test_sizes_are_decimal(size: int | str, size_bytes: int) -> None:
    assert with_size(size) == size_bytes


@given(
    st.decimals(min_value=decimal.Decimal("0.001"), max_value=10**6, places=3),
    st.sampled_from(["KB", "MB", "GB", "TB"]),
)
def test_sizes_mean_what_they_mean_in_transformers(number: decimal.Decimal, unit: str) -> None:
    assert with_size(f"{number}{unit}") == parse_size_to_int(f"{number}{unit}")


@given(st.text() | st.from_regex(r"\s*[0-9.]+\s*[KMGTkmgt\u212a][Bb]\s*", fullmatch=True))
@example("5\u212aB")
@example("1e400GB")
def test_any_text_is_a_size_or_an_option_error(text: str) -> None:
    with contextlib.suppress(OptionError):
        assert with_size(text) > 0


@pytest.mark.parametrize("run_dir", ["", "runs/\0", b"runs", None, 7, ["runs"]])
def test_an_illegal_run_directory_is_refused(run_dir: Any) -> None:
    with pytest.raises(OptionError, match="run_dir must be"):
        run_directory(run_dir)


def test_a_run_directory_stays_where_it_was_when_the_script_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = run_directory("runs/demo")
    assert run_dir == tmp_path / "runs/demo"
    assert run_directory(Path("runs/demo")) == run_dir
    assert run_directory(run_dir) == run_dir


@pytest.mark.parametrize("save_dtype", [None, "bfloat16"])
def test_what_stays_in_bf16_needs_fp8(save_dtype: str | None) -> None:
    with pytest.raises(OptionError, match="keep_in_bf16 has no effect without save_dtype='fp8'"):
        CheckpointerOptions(run_dir=RUN, save_dtype=save_dtype, keep_in_bf16=("a",))
    with pytest.raises(OptionError, match=r"keep_in_bf16 has '\*', which is no regular expression"):
        CheckpointerOptions(run_dir=RUN, save_dtype="fp8", keep_in_bf16=("*",))
