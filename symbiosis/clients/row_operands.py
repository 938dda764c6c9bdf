"""What multiplies rows before they leave: operands of the tenant's own that a host could solve for.

A method that changes the rows which a hosted weight meets, and not what comes back, lets the host see changed rows
where it knows the unchanged ones (they went to a sibling, or follow from what it computed itself): `a` of `a ∘ x`
follows by division, `R` of `x R` by regression. Which rows are such is observed where they meet the weight, whatever
the method:

1. an expression of the weight changes rows by a local operand (`weight_nodes`: `W diag(c)`, `W L`), or, where it is a
   sum (`W + diag(r) W`), gradients that leave beside the unchanged ones;
2. a module that stands around one hosted weight, with parameters of the tenant's own, hands on other rows than it was
   handed: numbers are compared, so that a cast or another shape is no change;
3. the last thing that happened to the rows took a trained parameter of the tenant's own (a norm's scale, for example).
   Autograd tells; where it records nothing, this one is not seen.

What is done with them goes by how much the mode hides (`Hides`): `pad` carries them like any row; plaintext, which
promises nothing, names them in the report; other modes refuse, because their promise is about rows and an operand meets
all of them. Whoever allows it anyway has them named.

Shape legend: T rows, I width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from symbiosis.clients.module_calls import around_the_weight
from symbiosis.clients.row_custody import class_name, last_parameter
from symbiosis.errors import PrivacyError
from symbiosis.privacy.mechanism import Hides

BY_DIVISION = "by division: rows leave with every column multiplied by a number of the tenant's own"
BY_REGRESSION = "by regression: rows leave multiplied by a matrix, or changed otherwise, of the tenant's own"

_ROUNDING = 8.0
"""How far a column's factor may differ from row to row and still be one, in units of the rows' rounding."""


class Operands:
    """The operands of one session. Each weight is named once. Thread-safe.

    Args:
        mode: the privacy mode, for messages.
        hides: how much it hides.
        allowed: whether the tenant lets them leave under a mode that hides a part.
    """

    def __init__(self, mode: str, hides: Hides, *, allowed: bool) -> None:
        self._mode = mode
        self._carried = hides is Hides.ALL
        self._refused = hides is Hides.PARTLY and not allowed
        self._found: dict[str, tuple[str, str]] = {}

    @property
    def report(self) -> list[dict[str, str]]:
        """What was found: the weight's name, who changes its rows, and how the change could be solved for."""
        return [{"layer": layer, "by": by, "how": how} for layer, (by, how) in self._found.copy().items()]

    def look(self, rows: torch.Tensor, layer: str) -> None:
        """Look at rows on their way to a weight (rules 2 and 3).

        Args:
            rows: any shape.
            layer: the weight's name.

        Raises:
            PrivacyError: they carry an operand, and the mode refuses it.
        """
        if self._carried or layer in self._found:
            return
        changed = around_the_weight(rows)
        if changed is not None and not _among(changed.sent, changed.handed):
            alike = next((tensor for tensor in changed.handed if tensor.shape == changed.sent.shape), None)
            self._keep(layer, class_name(changed.module), _how(changed.sent, alike))
            return
        trained = last_parameter(rows)
        if trained is not None:
            self._keep(layer, f"a trained parameter ({trained})", BY_DIVISION if "Mul" in trained else BY_REGRESSION)

    def multiplied(self, layer: str, *, by: str, how: str) -> None:
        """An expression changes the rows of a weight (rule 1).

        Raises:
            PrivacyError: as `look`.
        """
        if not self._carried and layer not in self._found:
            self._keep(layer, by, how)

    def _keep(self, layer: str, by: str, how: str) -> None:
        if self._refused:
            raise PrivacyError(
                f"{by} changes the rows of {layer} by numbers of the tenant's own before they leave, which the mode "
                f"{self._mode!r} does not hide from a host that sees enough of them ({how.partition(':')[0]})",
                "Use privacy='pad', or allow it with allow_operands=True (`base.allow_operands`); it is named then",
            )
        self._found[layer] = by, how


def _among(sent: torch.Tensor, handed: Iterable[torch.Tensor]) -> bool:
    """Whether rows are one of the tensors that a module was handed, in any shape or dtype."""
    return any(sent is tensor or _same(sent, tensor) for tensor in handed)


def _same(sent: torch.Tensor, tensor: torch.Tensor) -> bool:
    if sent.numel() != tensor.numel() or sent.device != tensor.device:
        return False
    mine, other = sent.detach().reshape(-1), tensor.detach().reshape(-1)
    return bool(mine.equal(other.to(mine.dtype)) or other.equal(mine.to(other.dtype)))


def _how(sent: torch.Tensor, handed: torch.Tensor | None) -> str:
    """How the change could be solved for: whether every row's columns were multiplied by the same numbers."""
    if handed is None:
        return BY_REGRESSION
    sent_TI, handed_TI = (tensor.detach().double().reshape(-1, tensor.shape[-1]) for tensor in (sent, handed))
    if sent_TI.shape[0] < 2:
        return BY_REGRESSION
    first, others = sent_TI[:1] * handed_TI, handed_TI[:1] * sent_TI  # a ratio without dividing by zeros
    rounding = max(torch.finfo(tensor.dtype).eps for tensor in (sent, handed))
    same = (first - others).norm() <= _ROUNDING * rounding * first.norm()
    return BY_DIVISION if same else BY_REGRESSION
