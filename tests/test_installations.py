"""An extension that was built for another torch, and none at all."""

from __future__ import annotations

import pytest
from cases import backends
from harness import python

pytestmark = pytest.mark.contract("fallback")


@pytest.mark.parametrize("backend", backends(["native"]))
def test_extension_built_for_another_torch_is_reported_not_loaded(backend: str) -> None:
    script = """
        import sys, warnings
        import torch
        torch.__version__ = "9.9.9+other"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import fastopt
            reason = fastopt.backends.why_not("native")
            assert not fastopt.backends.available("native")
        assert "9.9.9+other" in reason and "built" in reason, reason
        assert "fastopt._C" not in sys.modules
        assert any("9.9.9+other" in str(w.message) for w in caught)
        p = torch.nn.Parameter(torch.ones(3))
        try:
            fastopt.Adam([p], backend="native")
        except RuntimeError as error:
            assert "9.9.9+other" in str(error)
        else:
            raise SystemExit("an explicit request was ignored")
        for cls in (fastopt.Adam, fastopt.Ranger):
            p.grad = torch.ones(3)
            before = p.detach().clone()
            optimizer = cls([p])
            optimizer.step()
            assert (p < before).all()
        assert "9.9.9+other" in str(fastopt.info())
        assert "9.9.9+other" in str(fastopt.explain(optimizer))
    """
    python(script)


def test_without_an_extension_the_package_works() -> None:
    """No compiler at install time: torch's own code for the classes torch has, the reference backend for the rest."""
    script = """
        import importlib.util, sys
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == "fastopt._C" else real(name, *a)
        sys.modules["fastopt._C"] = None
        import torch, fastopt
        assert "compiler" in fastopt.backends.why_not("native")
        for name in ("SGD", "RMSprop", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Ranger"):
            p, q = torch.nn.Parameter(torch.linspace(-1, 1, 9)), torch.nn.Parameter(torch.linspace(-1, 1, 9))
            ours = getattr(fastopt, name)([p], lr=0.1)
            theirs = getattr(torch.optim, name, fastopt.Ranger)([q], lr=0.1)
            for t in range(9):
                if t == 4:
                    ours.load_state_dict(ours.state_dict())
                    theirs.load_state_dict(theirs.state_dict())
                p.grad, q.grad = torch.ones(9), torch.ones(9)
                ours.step(); theirs.step()
            assert torch.equal(p, q), name
        for overflow, scale, expected in ((0.0, 4.0, -0.1), (1.0, 4.0, 0.0)):
            p = torch.nn.Parameter(torch.zeros(1))
            scaled = fastopt.SGD([p], lr=0.1, momentum=0.9, fused=True)
            p.grad = torch.full((1,), scale)
            scaled.grad_scale, scaled.found_inf = torch.tensor(scale), torch.tensor(overflow)
            scaled.step()
            assert abs(p.item() - expected) < 1e-7, (overflow, p)
        lookahead = fastopt.Lookahead(fastopt.Adam([p]), k=2)
        lookahead.step(); lookahead.step()
        assert "torch" in str(fastopt.explain(ours)) or "reference" in str(fastopt.explain(ours))
        print(fastopt.info())
    """
    assert "compiler" in python(script)
