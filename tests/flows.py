"""What the tests of all flows measure: determinants, inverses, masses."""

import torch
from torch import Tensor

from gencli.contract import DataSpec
from gencli.nn.flow import Flow
from gencli.rng import generator, seeded

IMAGE = DataSpec(name="patterns", kind="image", shape=(2, 4, 4), levels=8, classes=("a", "b"))
POINTS = DataSpec(name="blobs", kind="points", shape=(2,))


def build(cls, spec, seed=0, jitter=0.1, **config):
    """A flow with every parameter moved by N(0, jitter^2), in evaluation mode: nothing is the identity any more."""
    with seeded(seed):
        flow = cls(cls.Config(**config), spec)
    with torch.no_grad():
        for name, p in flow.named_parameters():
            p += jitter * normal(*p.shape, key=name)
    return flow.eval()


def normal(*shape, key="x"):
    """Standard normal numbers that the key alone decides."""
    return torch.from_numpy(generator("flows", key).standard_normal(shape)).to(torch.get_default_dtype())


def log_det_of_jacobian(f, x: Tensor) -> Tensor:
    """log|det df/dx| of each example (n,), by autograd; ``f`` maps one example (1, ...) to one."""
    rows = []
    for i in range(len(x)):
        J = torch.autograd.functional.jacobian(lambda v, i=i: f(v[None], i).flatten(), x[i])
        rows.append(torch.linalg.slogdet(J.reshape(x[i].numel(), -1))[1])
    return torch.stack(rows)


def assert_a_flow(flow: Flow, n: int = 3, labels: Tensor | None = None) -> None:
    """In float64: log-determinant against autograd's Jacobian, inverse to 1e-10; then in float32, inverse to 1e-5."""
    assert torch.get_default_dtype() == torch.float64
    x = normal(n, *flow.spec.shape)
    z, log_det = flow.f(x, labels)
    assert z.shape == (n, flow.spec.dims) and log_det.shape == (n,)
    expected = log_det_of_jacobian(lambda v, i: flow.f(v, None if labels is None else labels[i : i + 1])[0], x)
    torch.testing.assert_close(log_det, expected, rtol=0, atol=1e-9)
    assert log_det.abs().min() > 1e-3, "a determinant of 1 shows nothing"
    with torch.no_grad():
        torch.testing.assert_close(flow.f_inverse(z, labels), x, rtol=0, atol=1e-10)
        torch.testing.assert_close(flow.f(flow.f_inverse(x.flatten(1), labels), labels)[0], x.flatten(1))
        torch.set_default_dtype(torch.float32)
        flow.float()
        z = flow.f(x.float(), labels)[0]
        assert (flow.f_inverse(z, labels) - x.float()).abs().max() <= 1e-5
        flow.double()
        torch.set_default_dtype(torch.float64)


def mass(flow: Flow, reach: float = 8.0, nodes: int = 801) -> float:
    """The integral of a 2-D flow's density over a square, by the trapezoid rule."""
    axis = torch.linspace(-reach, reach, nodes)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        p = flow.log_prob(grid, None).exp()
    return (p.sum() * (axis[1] - axis[0]) ** 2).item()
