from kvstrata.demo_model import held_out_text
from kvstrata.workload import TurnResult, WorkloadSpec, make_conversations


def test_equal_specs_give_equal_conversations():
    assert make_conversations(WorkloadSpec()) == make_conversations(WorkloadSpec())
    assert make_conversations(WorkloadSpec(seed=2)) != make_conversations(WorkloadSpec(seed=3))


def test_users_share_system_prompts_and_nothing_else():
    spec = WorkloadSpec(num_users=6, num_turns=3, num_system_prompts=2)
    conversations = make_conversations(spec)
    assert len({c.system_prompt for c in conversations}) == 2
    turns = [turn for c in conversations for turn in c.user_turns]
    assert len(set(turns)) == len(turns) == 18


def test_prompts_have_the_asked_size():
    conversation = make_conversations(WorkloadSpec(system_words=50, document_words=20, user_words=7, num_turns=3))[0]
    assert len(conversation.system_prompt.split()) == 50
    quoted = [turn.rpartition("\n\n")[0] for turn in conversation.user_turns]
    assert [len(text.split()) for text in quoted] == [27, 7, 7]


def test_text_is_held_out_and_each_turn_asks_something():
    for conversation in make_conversations(WorkloadSpec()):
        assert conversation.system_prompt in held_out_text()
        for turn in conversation.user_turns:
            quoted, _, question = turn.rpartition("\n\n")
            assert quoted in held_out_text()
            assert question.endswith(" do?")


def test_turn_results_are_values():
    result = TurnResult(0, 1, "pod-0", 0.1, 0.2, 10, 2, 5, 1, "x")
    assert result == TurnResult(0, 1, "pod-0", 0.1, 0.2, 10, 2, 5, 1, "x")
