"""When a request stops, and what it remembers."""

import pytest
from tests.folovllm.core_fakes import make_request

from folovllm.request import RequestStatus

FAR = 1000


def test_end_of_sequence_comes_before_stop_tokens_and_length() -> None:
    request = make_request("r", [1, 2], max_tokens=1, eos=(7,), stop_token_ids=(7,))
    request.append_output_token_ids([7])
    assert request.check_stop(3)
    assert request.status is RequestStatus.FINISHED_STOPPED
    assert request.stop_reason is None
    assert request.finish_reason == "stop"


def test_stop_token_comes_before_length_and_is_named() -> None:
    request = make_request("r", [1, 2], max_tokens=1, stop_token_ids=(7,))
    request.append_output_token_ids([7])
    assert request.check_stop(FAR)
    assert (request.finish_reason, request.stop_reason) == ("stop", 7)


def test_ignored_end_of_sequence_may_still_be_a_stop_token() -> None:
    request = make_request("r", [1], max_tokens=9, eos=(7,), ignore_eos=True)
    request.append_output_token_ids([7])
    assert not request.check_stop(FAR)
    request = make_request("r", [1], max_tokens=9, eos=(7,), ignore_eos=True, stop_token_ids=(7,))
    request.append_output_token_ids([7])
    assert request.check_stop(FAR)
    assert request.stop_reason == 7


@pytest.mark.parametrize(("max_tokens", "max_model_len"), [(2, FAR), (9, 4), (None, 4)])
def test_length_is_reached_by_max_tokens_or_by_the_models_context(max_tokens: int, max_model_len: int) -> None:
    request = make_request("r", [1, 2], max_tokens=max_tokens)
    request.append_output_token_ids([3])
    assert not request.check_stop(max_model_len)
    request.append_output_token_ids([4])
    assert request.check_stop(max_model_len)
    assert request.finish_reason == "length"


def test_min_tokens_hold_off_stop_tokens_but_not_the_context_length() -> None:
    request = make_request("r", [1], max_tokens=9, eos=(7,), min_tokens=2)
    request.append_output_token_ids([7])
    assert not request.check_stop(FAR)
    assert request.check_stop(2)
    assert request.finish_reason == "length"


def test_cached_tokens_are_those_of_the_first_scheduling() -> None:
    request = make_request("r", range(8))
    request.note_cached_tokens(6, 2)
    request.note_cached_tokens(7, 0)
    assert (request.num_cached_tokens, request.num_external_cached_tokens) == (6, 2)
    request.forget_cached_tokens(5)
    assert (request.num_cached_tokens, request.num_external_cached_tokens) == (5, 1)
    request.forget_cached_tokens(0)
    assert request.num_cached_tokens is None


def test_properties_follow_appended_tokens() -> None:
    request = make_request("r", [1, 2, 3])
    request.append_output_token_ids([9, 8])
    assert (request.num_prompt_tokens, request.num_tokens, request.num_output_tokens) == (3, 5, 2)
    assert request.output_token_ids == [9, 8]
    assert list(request.all_token_ids) == [1, 2, 3, 9, 8]
    assert request.prompt_token_ids == [1, 2, 3]
    assert len(request.block_hashes) == 1
