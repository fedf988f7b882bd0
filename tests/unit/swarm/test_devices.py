"""Facts about devices, from what torch says of machines of each kind."""

import pytest
import torch

from swarm.devices import DeviceFacts, Record, facts, look_at

GIB = 2**30
RECORDS = {
    "H100": (
        Record("cuda", "NVIDIA H100 80GB HBM3", 85_017_755_648, 84_485_079_040, None, (9, 0)),
        DeviceFacts("cuda", "NVIDIA H100 80GB HBM3", 85_017_755_648, 84_485_079_040, True, True),
    ),
    "T4": (  # torch emulates bf16 there, and says that it has it
        Record("cuda", "Tesla T4", 15_655_829_504, 15_500_000_000, None, (7, 5)),
        DeviceFacts("cuda", "Tesla T4", 15_655_829_504, 15_500_000_000, False, True),
    ),
    "MI300X": (  # torch names ROCm devices cuda
        Record("cuda", "AMD Instinct MI300X", 206_141_652_992, 205_520_896_000, "6.4.43482", (9, 4)),
        DeviceFacts("rocm", "AMD Instinct MI300X", 206_141_652_992, 205_520_896_000, True, True),
    ),
    "EPYC with AVX-512 BF16": (
        Record("cpu", "CPU", 24 * GIB, 20 * GIB, cpu={"avx512_bf16": True, "amx_bf16": False, "num_logical_cores": 2}),
        DeviceFacts("cpu", "CPU", 24 * GIB, 20 * GIB, True, False),
    ),
    "Xeon with AMX": (
        Record("cpu", "CPU", 24 * GIB, 20 * GIB, cpu={"avx512_bf16": False, "amx_bf16": True}),
        DeviceFacts("cpu", "CPU", 24 * GIB, 20 * GIB, True, False),
    ),
    "older CPU": (
        Record("cpu", "CPU", 8 * GIB, 2 * GIB, cpu={"avx2": True}),
        DeviceFacts("cpu", "CPU", 8 * GIB, 2 * GIB, False, False),
    ),
    "M2": (
        Record("mps", "Apple GPU", 16 * GIB, 12 * GIB),
        DeviceFacts("mps", "Apple GPU", 16 * GIB, 12 * GIB, False, False),
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_facts(name):
    record, expected = RECORDS[name]
    assert facts(record) == expected


def test_this_machine_is_read_as_it_is():
    seen = look_at(torch.device("cpu"))
    assert (seen.kind, seen.has_graphs) == ("cpu", False)
    assert 0 < seen.free_bytes <= seen.total_bytes
