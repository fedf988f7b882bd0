from node.connection import Connection


def said(connection, *history):
    """What is said over (seconds, number of peers)."""
    lines = [(now_s, connection.update(num_peers, now_s)) for now_s, num_peers in history]
    return [(now_s, line) for now_s, line in lines if line is not None]


def test_a_node_that_joins_loses_all_and_comes_back_says_so_once_each():
    connection = Connection(num_given=2, num_remembered=0, now_s=0)
    assert said(connection, (0, 0), (1, 0), (2, 1), (3, 3)) == [(2, "joined the swarm: 1 peer")]
    assert said(connection, (10, 0), (14, 0), (15, 0), (16, 0), (90, 0)) == [
        (15, "no peer is left: learning alone until one answers")
    ]
    assert connection.is_alone
    assert said(connection, (91, 4), (92, 3)) == [(91, "back in the swarm: 4 peers")]
    assert not connection.is_alone


def test_peers_that_do_not_answer_at_the_start_are_one_line():
    for given, remembered, line in (
        (2, 7, "none of the 2 peers given answers: learning alone until one answers"),
        (1, 0, "the peer given does not answer: learning alone until one answers"),
        (0, 7, "none of the 7 peers remembered answers: learning alone until one answers"),
    ):
        connection = Connection(given, remembered, now_s=100)
        assert said(connection, *((100 + second, 0) for second in range(60))) == [(105, line)]
        assert said(connection, (200, 1)) == [(200, "joined the swarm: 1 peer")]


def test_a_moment_without_peers_is_no_news():
    connection = Connection(num_given=1, num_remembered=0, now_s=0)
    assert len(said(connection, (1, 2), (2, 0), (4, 0), (6, 1), (7, 0), (11, 0), (11.5, 2))) == 1


def test_who_starts_a_swarm_is_alone_without_a_word():
    connection = Connection(num_given=0, num_remembered=0, now_s=0)
    assert said(connection, *((second, 0) for second in range(100))) == []
    assert said(connection, (100, 1)) == [(100, "joined the swarm: 1 peer")]
