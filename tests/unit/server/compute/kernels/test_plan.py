"""Plans: which kernel a plan chooses, its work, and how it explains itself."""

import torch

from poolrpc import AvgPool2d, LPPool2d, MaxPool2d
from poolrpc_server.compute.kernels import plan_for


def test_work_counts_the_cells_that_the_kernel_visits():
    """Work counts passes for a kernel that doubles windows, and every cell of every window for torch."""
    large = plan_for(MaxPool2d(63, 1, 31), torch.float32, (256, 256), None, "cpu")
    assert large.choose(16).name == "separable max"
    assert large.work(large.choose(16), 16) < 16 * 256 * 256 * 20
    eager = plan_for(AvgPool2d(63, 1, 31), torch.float32, (256, 256), None, "cuda")
    assert eager.work(None, 16) == 16 * 256 * 256 * 63 * 63


def test_a_plan_explains_itself_on_one_line():
    """explain() names the output's shape, and the kernels with the number of planes from which each is used."""
    plan = plan_for(MaxPool2d(2), torch.float32, (32, 32), None, "cpu")
    head = "MaxPool2d(2) float32 32x32 -> 16x16 NCHW on cpu: "
    assert plan.explain() == head + "tiny max from 1, separable max from 8 planes on, by estimate"
    assert "eager torch, no kernel" in plan_for(LPPool2d(3, 2), torch.float32, (8, 8), None, "cpu").explain()
    assert plan_for(MaxPool2d(2), torch.float32, (8, 8), 3, "cuda").explain().endswith("on cuda: torch's own kernels")


def test_plans_are_made_once():
    """Equal layers, dtypes, planes, layouts and devices have the same plan."""
    plan = plan_for(MaxPool2d(2), torch.float32, (56, 56), None, "cpu")
    assert plan_for(MaxPool2d((2, 2)), torch.float32, (56, 56), None, "cpu") is plan
    assert plan_for(MaxPool2d(2), torch.float64, (56, 56), None, "cpu") is not plan


def test_a_plan_chooses_by_the_number_of_planes():
    """A call of few planes is computed by torch, one of many by a kernel; another device has no kernels."""
    plan = plan_for(MaxPool2d(2), torch.float32, (56, 56), None, "cpu")
    assert plan.choose(1) is None
    assert plan.choose(512).name == "separable max"
    assert plan_for(MaxPool2d(2), torch.float32, (56, 56), None, "cuda").choose(512) is None
