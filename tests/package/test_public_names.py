"""What users can write: the public names with their signatures, and what type checkers are told of the losses."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

import cacr_kernels
from cacr_kernels import types
from cacr_kernels.integrations import cacr_ssl
from tests.package import typed_script

SHARED = (
    "normalize={}, reduction='mean', return_parts=False, gather_distributed=False, process_group=None, backend='auto'"
)
NUMBERS = "tau_pos=1.0, tau_neg=1.0, alpha=1.0, beta=1.0"
REFERENCES = "ref_embeddings=None, ref_labels=None, ref_index=None, ignore_index=None"
VIEWS = "pairing='unordered', cost='sqeuclidean', rbf_scale=2.0, tau_plus=0.0"
QUEUE = "in_batch=True, weight_grad='in_batch'"
SIGNATURES = {
    "CACRLoss": f"*, {NUMBERS}, {VIEWS}, {SHARED}",
    "CACRLoss.forward": "self, *views",
    "CACRMomentumLoss": f"*, temperature=1.0, cost='rbf', {SHARED}",
    "CACRMomentumLoss.forward": "self, queries, keys, *, key_offset=0",
    "CACRParts": "loss, attraction, repulsion, attraction_entropy, repulsion_entropy",
    "CACRQueueLoss": f"*, queue_size=0, dim=None, enqueue='all', {NUMBERS}, {QUEUE}, {SHARED}",
    "CACRQueueLoss.forward": "self, queries, keys, queue=None, *, update_queue=None",
    "CACRQueueLoss.reset_parameters": "self",
    "CACRWeights": "attraction, repulsion, indices, pairs",
    "SupervisedCACRLoss": f"*, {NUMBERS}, ignore_index=None, {SHARED}",
    "SupervisedCACRLoss.forward": "self, embeddings, labels, ref_embeddings=None, ref_labels=None, ref_index=None",
    "available_backends": "",
    "cacr_loss": f"views, *more, {NUMBERS}, {VIEWS}, {SHARED}",
    "cacr_momentum_loss": f"queries, keys, *, temperature=1.0, cost='rbf', key_offset=0, {SHARED}",
    "cacr_queue_loss": f"queries, keys, queue, *, {NUMBERS}, {QUEUE}, {SHARED}",
    "cacr_weights": "views, *, queries=None, top_k=10, tau_pos=1.0, tau_neg=1.0, pairing='unordered', normalize=False",
    "chunked_backward": "encoder, views, loss, *, chunk_size",
    "supervised_cacr_loss": f"embeddings, labels, *, {REFERENCES}, {NUMBERS}, {SHARED}",
}
PUBLISHED = {  # in cacr_kernels.integrations.cacr_ssl, as the published scripts call them
    "cacr_euclideanloss": "q_list, k, T",
    "cacr_rbfloss": "q_list, k, T",
    "moco_losses": f"q_list, k_list, queue, *, {NUMBERS}, unif_intra_batch=True",
    "our_loss1": "latent_codes_list, alpha=1.0, tau_pos=1.0, choice='full'",
    "our_loss2": "latent_codes_list, beta=1.0, tau_neg=1.0, tau_plus=0.1, choice='full', with_debiased=False",
}
KEYWORDS = {  # the declarations for type checkers
    "CACRLoss": types.ViewsKeywords,
    "CACRMomentumLoss": types.MomentumModuleKeywords,
    "CACRQueueLoss": types.QueueModuleKeywords,
    "SupervisedCACRLoss": types.SupervisedModuleKeywords,
    "cacr_loss": types.ViewsKeywords,
    "cacr_momentum_loss": types.MomentumKeywords,
    "cacr_queue_loss": types.QueueKeywords,
    "supervised_cacr_loss": types.SupervisedKeywords,
}


def public(name: str) -> Any:
    """The public object of that dotted name."""
    found: Any = cacr_kernels
    for part in name.split("."):
        found = getattr(found, part)
    return found


def plain_signature(function: Callable[..., Any]) -> str:
    """Names and defaults of the parameters, without types."""
    given = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in given.parameters.values()]
    return str(given.replace(parameters=bare, return_annotation=inspect.Signature.empty))[1:-1]


def test_names() -> None:
    """A new name is for ever: it is added here on purpose."""
    assert set(cacr_kernels.__all__) == {name for name in SIGNATURES if "." not in name} | {"__version__"}
    assert all(hasattr(cacr_kernels, name) for name in cacr_kernels.__all__)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    wanted = SIGNATURES[name].format(name.startswith(("CACR", "Supervised")))
    assert plain_signature(public(name)) == wanted


@pytest.mark.parametrize("name", PUBLISHED)
def test_signatures_of_the_published_functions(name: str) -> None:
    assert plain_signature(getattr(cacr_ssl, name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", KEYWORDS)
def test_declared_keywords_are_those_of_the_signature(name: str) -> None:
    parameters = inspect.signature(public(name)).parameters.values()
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "return_parts"]
    declared = typing.get_type_hints(KEYWORDS[name], vars(types))
    assert sorted(declared) == sorted(keywords)


def test_the_typed_script_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make lint` checks its types, and here they are compared with what is returned."""
    compared = []

    def compare(value: object, wanted: object) -> None:
        compared.append(value)
        assert isinstance(value, typing.get_args(wanted) or wanted)  # type: ignore[arg-type]

    monkeypatch.setattr(typed_script, "assert_type", compare)
    typed_script.main()
    assert any(isinstance(value, Tensor) for value in compared)
    assert len(compared) > 40
