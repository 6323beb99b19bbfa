from launcher.straggler import STEPS, Paces

HOSTS = {0: "a", 1: "b", 2: "c"}


def step(busy_s, waited_s):
    return {"event": "step", "step": 1, "busy_s": busy_s, "waited_s": waited_s}


def said(*each_rank, steps=STEPS, hosts=HOSTS):
    """What is said while every rank takes (busy, waited) seconds in each of so many steps."""
    paces = Paces(hosts)
    told = [paces.stepped(r, step(*spent)) for _ in range(steps) for r, spent in enumerate(each_rank)]
    return [text for text in told if text]


def test_the_rank_that_waits_least_is_named_once():
    (text,) = said((0.2, 0.9), (1.0, 0.1), (0.2, 0.9), steps=3 * STEPS)
    assert text.startswith("rank 1 (host b) is slow: 1.0 s of work in a step, the others need 200 ms and wait for it")


def test_nothing_is_said_of_ranks_that_are_nearly_alike_or_of_few_steps():
    assert said((0.8, 0.3), (1.0, 0.1), (0.9, 0.2)) == []
    assert said((0.2, 0.9), (1.0, 0.1), (0.2, 0.9), steps=STEPS - 1) == []
    assert said((0.2, 0.9), steps=3 * STEPS, hosts={0: "a"}) == []


def test_a_single_slow_step_is_no_slow_rank():
    paces = Paces(HOSTS)
    for number in range(3 * STEPS):
        for rank in HOSTS:
            assert paces.stepped(rank, step(30.0 if rank == 1 and number % STEPS == 7 else 0.2, 0.1)) is None


def test_where_all_wait_it_is_the_network():
    (text,) = said((0.1, 0.9), (0.1, 0.9), (0.12, 0.88), steps=2 * STEPS)
    assert text.startswith("communication takes 880 ms of a step of 1.0 s on every rank")


def test_a_network_that_takes_two_thirds_of_a_step_is_told_and_one_that_takes_half_is_not():
    assert said((0.1, 0.2), (0.09, 0.2), (0.1, 0.2))
    assert said((0.2, 0.2), (0.19, 0.2), (0.2, 0.2)) == []


def test_waiting_for_a_slow_rank_is_not_the_network():
    assert all("communication" not in text for text in said((0.1, 2.0), (2.0, 0.1), (0.1, 2.0), steps=2 * STEPS))


def test_tiny_steps_say_nothing_of_the_network():
    assert said((0.001, 0.05), (0.001, 0.05), (0.001, 0.05)) == []


def test_programs_that_tell_no_such_seconds_are_left_alone():
    paces = Paces(HOSTS)
    assert [paces.stepped(0, {"event": "step", "step": 1, "busy_s": None}) for _ in range(50)] == [None] * 50
