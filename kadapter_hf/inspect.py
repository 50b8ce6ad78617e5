"""Looking into a K-Adapter: its states, how similar they are, what can be read from them, and what adapters contribute."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.utils import is_sklearn_available

from .figures import new_figure
from .messages import needs
from .modeling.format_kadapter import KAdapterConfigError
from .modeling.modeling_kadapter import KAdapterPreTrainedModel


if TYPE_CHECKING:
    from matplotlib.figure import Figure

States = Mapping[str, np.ndarray]
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


@torch.no_grad()
def collect_states(
    model: KAdapterPreTrainedModel,
    batches: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    position: str | None = None,
) -> dict[str, np.ndarray]:
    """
    The hidden states of a model by name: `"backbone 0"` (the output of the embeddings) to `"backbone N"`, `"adapter <name>"`
    for each active adapter, and `"fused"`, which the head reads.

    All of them are kept in memory: roberta-large with two adapters takes 110 kB per token.

    Args:
        batches: the model's inputs, as a tokenizer or a DataLoader returns them, one batch or several: padded, as tensors,
            arrays or lists. Columns that are no inputs of the backbone, such as labels, are ignored. Each choice of multiple
            choice is a row.
        position: where to read. By default at every token that is not padding; `"first"`: at the first token of each row;
            or the name of a column with a position for each row, such as `"entity_start"`.

    Returns:
        Arrays of shape `(tokens or rows, width)`, whose rows correspond, in float32.

    Raises:
        KeyError: a batch has no such column.
        ValueError: the column does not have one position in the text for each row, a batch is not padded or has no inputs,
            the model has virtual tokens of PEFT's, or it is not a K-Adapter.
    """
    found: dict[str, list[torch.Tensor]] = {}
    with _evaluating(model):
        for batch in [batches] if isinstance(batches, Mapping) else batches:
            encoded = _encode(model, batch, output_hidden_states=True)
            named = {f"backbone {number}": state for number, state in enumerate(encoded.hidden_states or ())}
            named |= {f"adapter {name}": state for name, state in encoded.knowledge.items()}
            named["fused"] = model.fuse(encoded)
            rows, columns = _places(batch, position, encoded.backbone_state)
            for name, state in named.items():
                found.setdefault(name, []).append(state[rows.to(state.device), columns.to(state.device)].float().cpu())
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


@torch.no_grad()
def contributions(model: KAdapterPreTrainedModel, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """
    What each active adapter contributes to the state that the head reads: the norm of the change if the adapter is left out
    of the fusion, relative to the norm of the fused state. Unlike `fusion_weights`, which only some fusions have, it also
    depends on how far the adapter's output is from the backbone's state. In a fusion that needs the adapter, such as a gate
    with `top_k`, its output is set to zero instead.

    Returns:
        For each adapter `(batch, length)`, in float32; NaN at padding.

    Raises:
        ValueError: as `collect_states`.
    """
    with _evaluating(model):
        encoded = _encode(model, batch)
        state, knowledge = encoded.backbone_state, encoded.knowledge
        fused = model.fusion(state, knowledge)
        padding = torch.zeros(fused.shape[:2], dtype=torch.bool)
        if "attention_mask" in batch:
            padding = _column(batch, "attention_mask").cpu() == 0
        shares = {}
        for name in knowledge:
            try:
                without = model.fusion(state, {other: output for other, output in knowledge.items() if other != name})
            except KAdapterConfigError:  # the fusion chooses among more adapters than are left
                without = model.fusion(state, knowledge | {name: torch.zeros_like(knowledge[name])})
            change = (fused - without.to(fused)).norm(dim=-1) / fused.norm(dim=-1)
            shares[name] = change.float().cpu().masked_fill(padding, torch.nan).numpy()
    return shares


def linear_cka(first: np.ndarray, second: np.ndarray) -> float:
    """
    The linear centered kernel alignment of two arrays of shape `(rows, width)`, whose widths may differ: 1 if one is a
    rotation and scaling of the other, near 0 if they have nothing in common. Use many more rows than the width: few rows
    always look similar.

    Source: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019, section 3.

    Raises:
        ValueError: the numbers of rows differ, or an array has another shape.
    """
    if len(first) != len(second):
        raise ValueError(f"the states must be of the same tokens, and there are {len(first)} and {len(second)} rows.")
    centered = [states - states.mean(0) for states in (_matrix(first), _matrix(second))]
    products = [np.linalg.norm(a.T @ b) for a, b in ((centered[0],) * 2, (centered[1],) * 2)]
    scale = float(np.prod(products))
    return float(np.linalg.norm(centered[1].T @ centered[0]) ** 2 / scale) if scale else 0.0


def similarities(states: States) -> np.ndarray:
    """`linear_cka` of each pair of states, `(states, states)`, in their order."""
    arrays = list(states.values())
    matrix = np.eye(len(arrays))
    for row in range(len(arrays)):
        for column in range(row):
            matrix[row, column] = matrix[column, row] = linear_cka(arrays[row], arrays[column])
    return matrix


def probe(states: States, labels: Sequence[Any] | np.ndarray, folds: int = 5) -> dict[str, np.ndarray]:
    """
    How well a linear classifier reads labels from each state: where knowledge sits. A logistic regression on standardised
    states, cross-validated. Compare with the most frequent label's share, and with random labels: a wide state can tell
    rows apart that have nothing to do with the label.

    Args:
        states: from `collect_states`, with as many rows as there are labels.
        labels: a class for each row.

    Returns:
        For each state the accuracies on the held-out part of each fold, `(folds,)`.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: a label is missing, a class has fewer rows than there are folds, or there are not as many labels as rows.
    """
    if not is_sklearn_available():
        raise ImportError(needs("probe", "scikit-learn", "knowledge"))
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if any(label is None or label != label for label in labels):  # pandas makes NaN of what is missing
        raise ValueError("a label is missing: leave out the rows without one.")
    counts = np.unique(np.asarray(labels), return_counts=True)[1]
    if len(counts) < 2 or counts.min() < folds:
        raise ValueError(f"probe needs two classes or more with at least {folds} rows each, one for each fold.")
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    split = StratifiedKFold(folds, shuffle=True, random_state=0)
    for name, state in states.items():
        if len(state) != len(labels):
            raise ValueError(f"'{name}' has {len(state)} rows, and there are {len(labels)} labels.")
    return {name: cross_val_score(classifier, state, labels, cv=split) for name, state in states.items()}


def effective_rank(states: np.ndarray) -> float:
    """
    The number of directions that an array of shape `(rows, width)` uses: the exponential of the entropy of its singular
    values. What the adapters changed uses those of `states["fused"] - states["backbone 24"]`.

    Source: Roy and Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007.

    Returns:
        Between 1 and the smaller of rows and width; 0 if all values are 0.

    Raises:
        ValueError: the array has another shape, or a value is not finite.
    """
    values = np.linalg.svd(_matrix(states), compute_uv=False)
    if not values.any():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def draw_similarities(states: States) -> "Figure":
    """A figure of `similarities`."""
    matrix, names = similarities(states), list(states)
    size = 2 + 0.3 * len(names)
    figure = _figure(size + 1, size)
    axes = figure.subplots()
    image = axes.imshow(matrix, vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    figure.colorbar(image, label="linear CKA")
    return figure


def draw_probe(accuracies: Mapping[str, np.ndarray]) -> "Figure":
    """
    A figure of the accuracies that `probe` returns: mean and standard deviation over the folds.

    Raises:
        ValueError: there are no accuracies.
    """
    if not accuracies:
        raise ValueError("there are no accuracies to draw; probe returns one array of them for each state.")
    figure = _figure(6, 1 + 0.25 * len(accuracies))
    axes = figure.subplots()
    means, deviations = zip(*((np.mean(folds), np.std(folds)) for folds in accuracies.values()), strict=True)
    axes.barh(list(accuracies), means, xerr=deviations)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="accuracy of a linear classifier")
    return figure


def draw_contributions(shares: Mapping[str, np.ndarray], tokens: Sequence[str], row: int = 0) -> "Figure":
    """
    A figure of what `contributions` returns for one row of the batch; `tokens` are its tokens, such as
    `tokenizer.convert_ids_to_tokens(input_ids)`.

    Raises:
        ValueError: there are no contributions, as no adapter is active.
    """
    if not shares:
        raise ValueError("there are no contributions to draw, as no knowledge adapter is active.")
    values = np.stack([np.asarray(share)[row, : len(tokens)] for share in shares.values()])
    figure = _figure(2 + 0.4 * len(tokens), 2 + 0.3 * len(shares))
    axes = figure.subplots()
    image = axes.imshow(values, vmin=0, aspect="auto")
    axes.set_xticks(range(len(tokens)), tokens, rotation=90)
    axes.set_yticks(range(len(shares)), list(shares))
    figure.colorbar(image, label="change")
    return figure


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """A K-Adapter without dropout, for the duration of a `with` block."""
    if not hasattr(model, "fuse"):  # not by class, as the model may be wrapped, or of its repository's code
        raise ValueError(f"the model must be a K-Adapter, and it is a {type(model).__name__}.")
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _matrix(states: Any) -> np.ndarray:
    """States as an array of shape `(rows, width)`, in float64."""
    array = np.asarray(states.detach().double().cpu() if torch.is_tensor(states) else states, float)
    if array.ndim != 2 or not np.isfinite(array).all():
        raise ValueError(
            f"states must be finite numbers of the shape (rows, width), and their shape is {array.shape}."
        )
    return array


def _column(batch: Mapping[str, Any], name: str) -> torch.Tensor:
    """A column as a tensor, `(batch, …)`. Of multiple choice, each choice is a row."""
    try:
        tensor = torch.as_tensor(batch[name])
    except (TypeError, ValueError) as error:
        raise ValueError(f"'{name}' is no tensor ({error}): call the tokenizer with padding=True.") from error
    return tensor.flatten(0, 1) if tensor.dim() == 3 and not tensor.is_floating_point() else tensor


def _encode(model: KAdapterPreTrainedModel, batch: Mapping[str, Any], **kwargs: Any) -> Any:
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "PEFT's virtual tokens are not among the states; to look inside the K-Adapter without them, pass "
            "model.get_base_model()."
        )
    if not isinstance(batch, Mapping) or not {"input_ids", "inputs_embeds"} & batch.keys():
        raise ValueError("a batch is what a tokenizer returns, a mapping with 'input_ids' and 'attention_mask'.")
    inputs: dict[str, Any] = {name: _column(batch, name).to(model.device) for name in INPUTS if name in batch}
    if any(tensor.dim() < 2 for tensor in inputs.values()):
        raise ValueError("the batch is a single text: pass the tokenizer a list of texts.")
    return model.encode(**inputs, **kwargs)


def _places(batch: Mapping[str, Any], position: str | None, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The row and column of each state to read."""
    mask = _column(batch, "attention_mask").cpu() if "attention_mask" in batch else torch.ones(states.shape[:2])
    if position is None:
        rows, columns = mask.nonzero(as_tuple=True)
        return rows, columns
    if position != "first" and position not in batch:
        raise KeyError(f"the batch has no '{position}'; it has {', '.join(batch)}.")
    places = mask.long().argmax(1) if position == "first" else _column(batch, position).cpu()
    rows = torch.arange(len(states))
    whole = places.shape == rows.shape and not places.is_floating_point()
    if not whole or (places < 0).any() or (places >= states.shape[1]).any() or not mask[rows, places].all():
        raise ValueError(
            f"'{position}' must have one position in the text for each of {len(states)} rows, as integers."
        )
    return rows, places


def _figure(width: float, height: float) -> "Figure":
    figure = new_figure(width, height)
    if figure is None:
        raise ImportError(needs("a figure", "matplotlib", "knowledge"))
    return figure
