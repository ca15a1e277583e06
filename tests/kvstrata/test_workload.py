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
    assert [len(turn.split()) for turn in conversation.user_turns] == [27, 7, 7]


def test_turn_results_are_values():
    result = TurnResult(0, 1, "pod-0", 0.1, 0.2, 10, 2, 5, 1, "x")
    assert result == TurnResult(0, 1, "pod-0", 0.1, 0.2, 10, 2, 5, 1, "x")
