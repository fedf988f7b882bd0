"""Which settings several processes can follow, and which process this is."""

import pytest

from node.config import RunConfig
from node.torchrun import Launch, LaunchError, launch

TWO = Launch(0, 2, 2)
STARTED = {"TORCHELASTIC_RUN_ID": "none"}  # by torchrun


def test_a_process_alone_is_the_node_whatever_else_the_environment_says():
    assert launch({}) == launch({"WORLD_SIZE": "2"}) == launch({"WORLD_SIZE": "2", "RANK": "x"}) == Launch(0, 1, 1)
    assert launch({**STARTED, "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0"}) == Launch(0, 1, 1)
    assert not launch({}).is_shared


def test_of_several_the_first_is_the_node():
    launches = [launch({**STARTED, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank)}) for rank in range(2)]
    assert [one.follows for one in launches] == [False, True]
    assert all(one.is_shared for one in launches)


@pytest.mark.parametrize(
    ("launched", "settings", "message"),
    [
        (Launch(0, 4, 2), {}, "--nnodes 1"),
        (TWO, {"model": {"device": "cuda:1"}}, "model.device=cuda:1 is for one process: set auto"),
        (TWO, {"model": {"device": "mps"}}, "model.device=mps is for one process"),
        (TWO, {"engine": {"speculation": "head"}}, "engine.speculation=head .* set suffix, ngram or off"),
        (TWO, {"engine": {"speculation": "auto"}}, "engine.speculation=auto"),
    ],
)
def test_what_several_cannot_follow_is_one_line_with_the_fix(launched, settings, message):
    with pytest.raises(LaunchError, match=message) as error:
        launched.check(RunConfig(**settings))
    assert "\n" not in str(error.value)
    Launch(0, 1, 1).check(RunConfig(**settings))


def test_what_they_can_follow_is_not_refused():
    TWO.check(RunConfig(model={"device": "cuda"}, engine={"speculation": "suffix"}))


def test_each_process_has_a_gpu_of_its_own_where_there_are_any():
    assert [Launch(rank, 2, 2).device("auto", 4) for rank in range(2)] == ["cuda:0", "cuda:1"]
    assert TWO.device("cpu", 4) == TWO.device("auto", 0) == "cpu"
    assert TWO.device("cuda", 0) == "cuda", "whoever loads the model says that there is none"
    with pytest.raises(LaunchError, match=r"starts 2 processes, and torch sees 1 GPUs: --nproc-per-node 1, or"):
        TWO.device("auto", 1)
