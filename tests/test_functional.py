"""The mathematics against a naive loop written from the paper's equations."""

from __future__ import annotations

import math

import pytest
import torch

from lily_diffusers import functional

S_, B_, N, IN, OUT, R_, E = 3, 2, 5, 12, 10, 4, 3  # slots, batch, tokens, widths, rank, experts


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "x": (B_, N, IN),
        "A": (S_, R_, IN),
        "R": (S_, E, R_),
        "rho": (S_, E),
        "B": (S_, E, R_, OUT),
        "base": (S_, B_, N, OUT),
    }
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def naive(t: dict[str, torch.Tensor], kind: str, scaling: float) -> torch.Tensor:
    """Eq. 1-4, one number at a time over samples, tokens and experts. Returns (s, b, n, o)."""
    out = torch.empty(S_, B_, N, OUT)
    for s in range(S_):
        votes = torch.empty(B_, N, E)
        scores = torch.empty(B_, N, E)
        for b in range(B_):
            for n in range(N):
                h = t["A"][s] @ t["x"][b, n]  # Eq. 1
                for e in range(E):
                    scores[b, n, e] = sum(h[k] * t["R"][s, e, k] for k in range(R_))
                exp = [math.exp(scores[b, n, e] + t["rho"][s, e]) for e in range(E)]
                votes[b, n] = torch.tensor([value / sum(exp) for value in exp])
        for b in range(B_):
            if kind == "token":
                S = votes[b].mean(0)
            elif kind == "batch":
                S = votes.mean((0, 1))
            elif kind == "sequence":  # Eq. 2
                S = torch.softmax(scores[b].sum(0) + t["rho"][s], 0)
            else:
                S = torch.softmax(t["rho"][s], 0)
            for n in range(N):
                h = t["A"][s] @ t["x"][b, n]
                delta = sum(S[e] * (h @ t["B"][s, e]) for e in range(E))  # Eq. 3, before it is rearranged
                out[s, b, n] = t["base"][s, b, n] + scaling * delta  # Eq. 4
    return out


@pytest.mark.parametrize("kind", ["token", "sequence", "batch", "static"])
def test_a_slot_agrees_with_the_papers_equations(tensors: dict[str, torch.Tensor], kind: str) -> None:
    h = functional.project_down(tensors["x"], list(tensors["A"]))
    route = {"token": functional.route_token, "sequence": functional.route_sequence, "batch": functional.route_batch}
    S = route[kind](h, tensors["R"], tensors["rho"]) if kind in route else functional.route_static(tensors["rho"])
    M = functional.mix_experts(0.5 * S, tensors["B"])
    ours = torch.stack([functional.add_delta_(tensors["base"][s].clone(), h[s], M[s]) for s in range(S_)])
    torch.testing.assert_close(ours, naive(tensors, kind, 0.5), rtol=1e-5, atol=1e-5)


def test_shared_tensors_give_what_copies_give(tensors: dict[str, torch.Tensor]) -> None:
    A, B, R = tensors["A"][0], tensors["B"][0], tensors["R"][0]
    h_copies = functional.project_down(tensors["x"], [A.clone() for _ in range(S_)])
    h_shared = functional.project_down(tensors["x"], [A]).expand(S_, -1, -1, -1)
    torch.testing.assert_close(h_shared, h_copies)
    S_copies = functional.route_token(h_copies, functional.stack_slots([R.clone() for _ in range(S_)]))
    S_shared = functional.route_token(h_shared, functional.stack_slots([R]))
    torch.testing.assert_close(S_shared, S_copies)
    M_copies = functional.mix_experts(S_copies, functional.stack_slots([B.clone() for _ in range(S_)]))
    torch.testing.assert_close(functional.mix_experts(S_shared, functional.stack_slots([B])), M_copies)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_routing_weights_are_float32_and_sum_to_one_in_half_precision(tensors: dict[str, torch.Tensor], dtype) -> None:
    h = functional.project_down(tensors["x"], list(tensors["A"])).to(dtype)
    for route in (functional.route_token, functional.route_sequence, functional.route_batch):
        S = route(h, tensors["R"].to(dtype), tensors["rho"].to(dtype))
        assert S.dtype == torch.float32
        torch.testing.assert_close(S.sum(-1), torch.ones(S.shape[:-1]), rtol=0, atol=1e-6)


def test_similarity_tells_copies_from_orthogonal_experts() -> None:
    expert = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert functional.pairwise_similarity(torch.stack([expert, -2 * expert])).item() == pytest.approx(1, abs=1e-6)
    orthogonal = torch.eye(3).reshape(3, 1, 3)
    assert functional.pairwise_similarity(orthogonal).item() == 0


def test_entropy_is_one_for_uniform_and_zero_for_a_single_expert() -> None:
    S = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]])
    torch.testing.assert_close(functional.entropy(S), torch.tensor([1.0, 0.0]))
