"""Names in a run directory: what is made is recognised, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stillframe import names

RUN = Path("/run")
STEPS = st.integers(min_value=0, max_value=10**18 - 1)
ATTEMPTS = st.builds("{:016x}.{}".format, st.integers(0, 2**64 - 1), st.integers(0, 10**9 - 1))


@given(STEPS)
@example(0)
@example(10**18 - 1)
def test_a_published_name_is_read_back(step: int) -> None:
    assert names.parse_published(names.published_path(RUN, "hf", step).name) == ("hf", step)


@given(STEPS, ATTEMPTS)
def test_names_of_other_states_are_never_taken_for_published_ones(step: int, attempt: str) -> None:
    retired = names.retired_path(RUN, "hf", step, attempt).name
    complete = names.complete_path(RUN, "hf", step, attempt).name
    assert names.is_retired(retired)
    assert names.parse_complete(complete) == ("hf", step, attempt)
    assert names.parse_incomplete(names.incomplete_path(RUN, "hf", step).name) == ("hf", step)
    assert names.parse_incomplete(complete) is None
    assert names.parse_complete(names.incomplete_path(RUN, "hf", step).name) is None
    assert names.parse_complete(retired) is None
    assert not names.is_retired(complete)
    for name in (retired, complete, names.incomplete_path(RUN, "hf", step).name, names.latest_path(RUN, "hf").name):
        assert names.parse_published(name) is None
    assert not names.is_retired(names.published_path(RUN, "hf", step).name)
    assert not names.is_retired(names.incomplete_path(RUN, "hf", step).name)


@given(st.text(alphabet=st.sampled_from("hf-0123456789 \n\0.+_eEx٣５")) | st.text())
@example("hf-07")
@example("hf-1\n")
@example("hf-1٣")  # int() takes the digits of every script
@example("hf-５")
@example("hf--1")
@example("hf-+1")
@example("hf-1_0")
@example("hf- 1")
@example("hf-")
@example("HF-1")
@example("dcp-1")
@example(f"hf-{10**18}")
def test_only_exact_names_are_published_ones(name: str) -> None:
    parsed = names.parse_published(name)
    if parsed is not None:
        assert name == f"{parsed[0]}-{parsed[1]}"
        assert names.published_path(RUN, *parsed).name == name


@pytest.mark.parametrize("name", ["hf-07", "hf-1\n", "hf-1٣", "hf-５", "hf--1", "hf-1_0", "HF-1", f"hf-{10**18}", "hf"])
def test_what_is_nearly_a_published_name_is_none(name: str) -> None:
    assert names.parse_published(name) is None


@pytest.mark.parametrize("state", ["retired", "complete"])
@pytest.mark.parametrize(
    "name",
    [
        ".hf-5.{}-",
        ".hf-5.{}-0123456789abcdef",
        ".hf-5.{}-0123456789abcdef.",
        ".hf-5.{}-0123456789ABCDEF.1",
        ".hf-5.{}-0123456789abcdef.1\n",
        ".hf-5.{}-0123456789abcdef.٣",
        ".hf-05.{}-0123456789abcdef.1",
        ".hf-5.{}-012.1",
        "hf-5.{}-0123456789abcdef.1",
    ],
)
def test_what_is_nearly_the_name_of_a_leftover_is_none(name: str, state: str) -> None:
    assert names.is_retired(".hf-5.retired-0123456789abcdef.1")
    assert names.parse_complete(".hf-5.complete-0123456789abcdef.1") == ("hf", 5, "0123456789abcdef.1")
    assert not names.is_retired(name.format(state))
    assert names.parse_complete(name.format(state)) is None


@pytest.mark.parametrize(
    "text", ["", "0123456789abcdef", "0123456789abcdef.1\n", "0123456789abcdef.1/..", "../x.1", "٣.1"]
)
def test_only_what_a_ballot_makes_is_an_attempt(text: str) -> None:
    assert names.is_attempt("0123456789abcdef.1")
    assert not names.is_attempt(text)


@pytest.mark.parametrize(
    "name",
    [
        "hf-5.incomplete",
        ".hf-05.incomplete",
        ".hf-5.incomplete\n",
        ".hf-5.Incomplete",
        ".hf-.incomplete",
        ".x-5.incomplete",
    ],
)
def test_what_is_nearly_the_name_of_an_attempts_directory_is_none(name: str) -> None:
    assert names.parse_incomplete(".checkpoint-5.incomplete") == ("checkpoint", 5)
    assert names.parse_incomplete(name) is None


def test_an_attempts_own_files_are_inside_its_work_directory() -> None:
    assert names.marker_name("0123456789abcdef.7") == ".stillframe/attempt-0123456789abcdef.7"
    receipts = [names.receipt_name(rank) for rank in (0, 7, 99_999, 100_000)]
    assert len(set(receipts)) == 4
    assert all(name.startswith(f"{names.WORK_DIR_NAME}/receipt-") for name in receipts)
