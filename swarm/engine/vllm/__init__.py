"""The vLLM engine: vLLM in a process of its own, with this project's noise and live weights.

    engine    the contract: which request has written what, under which policy
    host      starts the process, talks to it, ends it
    child     what runs in it: vLLM, stepped from outside
    worker    what vLLM is given: what draws, and where weights come from
    counter   what draws tokens, and along drafts
    verify    which of those are kept
    shared    weights in memory of the host that both processes see
    handles   weights on a GPU that both processes see
    adapters  what alone is handed over of a policy with adapters
    memory    how much the KV cache gets
    pipe      messages between the two
    installed which vLLM there is, and whether it can run here

Only `child`, `worker` and `counter` import vLLM, so a node that uses it never has it in its own process.
"""

from swarm.engine.vllm.engine import VllmEngine
from swarm.engine.vllm.host import VllmHost

__all__ = ["VllmEngine", "VllmHost"]
