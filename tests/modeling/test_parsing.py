"""The dependency parser: scores and losses computed by hand, tree decoding, and training with the stock Trainer."""

import itertools
import json

import networkx
import pytest
import torch
from conftest import DIVIDES_GRADIENTS_AGAIN, disturb, inputs_for, labels_for, small_adapter
from test_heads import fused_states, linear
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from kadapter_hf import KAdapterForDependencyParsing
from kadapter_hf.collators import DataCollatorForDependencyParsing
from kadapter_hf.metrics import decode_for_metrics, dependency_metrics, words_in
from kadapter_hf.modeling.parsing_kadapter import decode_tree


RELATIONS = ["det", "nsubj", "obj", "punct", "root"]
SENTENCES = [  # words, heads and relations
    ("the cat sat .", [2, 3, 0, 3], ["det", "nsubj", "root", "punct"]),
    ("dante wrote the book .", [2, 0, 4, 2, 2], ["nsubj", "root", "det", "obj", "punct"]),
    ("the dog", [2, 0], ["det", "root"]),
    ("mozart composed a opera", [2, 0, 4, 2], ["nsubj", "root", "det", "obj"]),
]


@pytest.fixture
def parser(build):
    return build(KAdapterForDependencyParsing, num_labels=5)


@pytest.fixture
def inputs():
    return inputs_for(KAdapterForDependencyParsing)


@pytest.fixture
def labels(inputs):
    return labels_for(KAdapterForDependencyParsing, inputs, num_labels=5)


@pytest.fixture
def collator(tokenizer):
    return DataCollatorForDependencyParsing(tokenizer)


@pytest.fixture
def rows(tokenizer):
    """The sentences as a dataset's rows: each word is one token, after the initial special token."""
    found = []
    for text, heads, relations in SENTENCES:
        row = dict(tokenizer(text))
        row["word_starts"] = list(range(1, len(heads) + 1))
        row["head_labels"] = heads
        row["relation_labels"] = [RELATIONS.index(relation) for relation in relations]
        found.append({name: row[name] for name in ("input_ids", "attention_mask", *list(row)[-3:])})
    return found


def trainer_for(model, rows, folder, collator, **kwargs) -> Trainer:
    arguments = {"learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no"}
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, **(arguments | kwargs)
    )
    return Trainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator,
        compute_metrics=dependency_metrics(RELATIONS),
        preprocess_logits_for_metrics=decode_for_metrics,
    )


# ---- Scores ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_scores_are_biaffine_in_each_word_and_each_head(parser, inputs):
    output = parser(**inputs)
    states = fused_states(parser, inputs)
    lowest = torch.finfo(torch.float32).min
    for row, starts in enumerate(inputs["word_starts"].tolist()):
        heads = states[row, [0, *(start for start in starts if start >= 0)]]
        arc_word, arc_head, relation_word, relation_head = (
            F.leaky_relu(linear(heads, getattr(parser, name)), 0.1)
            for name in ("arc_word", "arc_head", "relation_word", "relation_head")
        )
        u, b = parser.arc_scorer.weight, parser.arc_scorer.bias
        weight = parser.relation_scorer.weight.view(5, 33, 32)
        bias = parser.relation_scorer.bias.view(5, 33)
        for word in range(4):
            for head in range(5):
                found = output.arc_logits[row, word, head]
                if max(word + 1, head) >= len(heads) or head == word + 1:
                    assert found == lowest
                    continue
                dependent = arc_word[word + 1]
                torch.testing.assert_close(found, arc_head[head] @ u @ dependent + arc_head[head] @ b)
                dependent, governor = relation_word[word + 1], relation_head[head]
                for label in range(5):
                    wanted = governor @ weight[label, :32] @ dependent + governor @ bias[label, :32]
                    wanted = wanted + weight[label, 32] @ dependent + bias[label, 32]
                    torch.testing.assert_close(output.relation_logits[row, word, head, label], wanted)


@torch.no_grad()
def test_only_the_root_and_the_words_are_fused(parser, inputs):
    seen = []
    parser.fusion.states["factual"].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    parser(**inputs)
    assert [states.shape[:2] for states in seen] == [(4, 5)]


@torch.no_grad()
def test_padding_of_words_changes_nothing(parser, inputs):
    padded = inputs | {"word_starts": F.pad(inputs["word_starts"], (0, 3), value=-1)}
    wanted, found = parser(**inputs), parser(**padded)
    torch.testing.assert_close(found.arc_logits[:, :4, :5], wanted.arc_logits)
    assert words_in(found.arc_logits) == words_in(wanted.arc_logits) == [3, 4, 3, 4]
    assert parser.decode(found, padded["word_starts"]) == parser.decode(wanted, inputs["word_starts"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_stays_finite_and_its_padding_is_seen(dtype, build, inputs, labels):
    parser = build(KAdapterForDependencyParsing, num_labels=5, dtype=dtype)
    output = parser(**inputs, **labels)
    assert output.arc_logits.dtype == dtype and output.arc_logits.isfinite().all()
    assert output.loss.dtype == torch.float32 and output.loss.isfinite()
    assert words_in(output.arc_logits) == words_in(output.arc_logits.float()) == [3, 4, 3, 4]


# ---- Losses ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_loss_is_each_rows_mean_over_arcs_and_over_relations_at_the_right_heads(parser, inputs, labels):
    labels["head_labels"][1, 2] = -100  # its relation is ignored too
    labels["relation_labels"][3, 0] = -100
    output = parser(**inputs, **labels)
    arcs, relations = output.arc_logits.log_softmax(-1), output.relation_logits.log_softmax(-1)
    total = 0
    for row in range(4):
        pairs = list(zip(labels["head_labels"][row].tolist(), labels["relation_labels"][row].tolist(), strict=True))
        of_arcs = [-arcs[row, word, head] for word, (head, _) in enumerate(pairs) if head != -100]
        of_relations = [
            -relations[row, word, head, relation]
            for word, (head, relation) in enumerate(pairs)
            if -100 not in (head, relation)
        ]
        total += sum(of_arcs) / len(of_arcs) + sum(of_relations) / len(of_relations)
    torch.testing.assert_close(output.loss, total / 4)


def test_training_scores_relations_at_the_right_heads_only_with_the_same_loss_and_gradients(parser, inputs, labels):
    for module in parser.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    results = []
    for training in (False, True):
        parser.zero_grad()
        output = parser.train(training)(**inputs, **labels)
        assert (output.relation_logits is None) == training
        output.loss.backward()
        results.append({name: p.grad.clone() for name, p in parser.named_parameters() if p.grad is not None})
        results[-1]["loss"] = output.loss.detach()
    assert results[0].keys() == results[1].keys() and len(results[0]) > 13
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)
    assert parser(**inputs).relation_logits is not None


@torch.no_grad()
def test_losses_of_parts_add_up_to_that_of_the_whole_with_a_count(parser, inputs, labels):
    everything = inputs | labels
    count = (labels["head_labels"] != -100).sum()
    whole = parser(**everything, num_items_in_batch=count).loss
    parts = [
        parser(**{name: value[part] for name, value in everything.items()}, num_items_in_batch=int(count)).loss
        for part in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


@torch.no_grad()
def test_row_without_any_label_adds_nothing(parser, inputs, labels):
    whole = parser(**inputs, **labels).loss
    alone = parser(**{name: value[:1] for name, value in (inputs | labels).items()}).loss
    labels["head_labels"][0] = -100
    torch.testing.assert_close(parser(**inputs, **labels).loss, whole - alone / 4)
    labels["head_labels"][:] = -100
    assert parser(**inputs, **labels).loss == 0


# ---- Errors ---------------------------------------------------------------------------------------------------------


def test_missing_word_starts_are_named(parser, inputs):
    del inputs["word_starts"]
    with pytest.raises(ValueError, match=r"word_starts is missing.*shape \(batch, words\)"):
        parser(**inputs)


@pytest.mark.parametrize(
    "starts", [torch.ones(4).long(), torch.ones(3, 2).long(), torch.ones(4, 2), torch.ones(4, 2, 2).long()]
)
def test_word_starts_of_another_shape_or_dtype_are_named(starts, parser, inputs):
    with pytest.raises(ValueError, match=r"word_starts must be a LongTensor of shape \(4, words\), not"):
        parser(**(inputs | {"word_starts": starts}))


@pytest.mark.parametrize("start", [10, -2])
def test_word_outside_the_text_is_named(start, parser, inputs):
    inputs["word_starts"][2, 1] = start
    with pytest.raises(ValueError, match=f"word_starts has {start}, but the rows are 10 tokens long"):
        parser(**inputs)


def test_word_after_the_end_of_a_row_is_refused(parser, inputs):
    inputs["word_starts"][1, 1] = -1
    with pytest.raises(ValueError, match="word_starts has a word after a -1"):
        parser(**inputs)


@pytest.mark.parametrize("name", ["head_labels", "relation_labels"])
def test_labels_of_another_shape_are_named(name, parser, inputs, labels):
    with pytest.raises(ValueError, match=rf"{name} must be a LongTensor of shape \(4, 4\), as word_starts"):
        parser(**inputs, **(labels | {name: labels[name][:, :3]}))


@pytest.mark.parametrize(
    ("row", "word", "head"),
    [(1, 2, 5), (1, 2, -1), (1, 2, 3), (0, 1, 4), (0, 3, 0)],
    ids=["outside", "negative", "itself", "padding", "of padding"],
)
def test_impossible_head_is_named(row, word, head, parser, inputs, labels):
    labels["head_labels"][row, word] = head
    with pytest.raises(ValueError, match=f"head_labels has {head} for word {word + 1} of row {row}"):
        parser(**inputs, **labels)


def test_decode_says_what_it_misses(parser, inputs, labels):
    output = parser.train()(**inputs, **labels)
    with pytest.raises(ValueError, match="no relation_logits: call the model without labels or in evaluation mode"):
        parser.decode(output, inputs["word_starts"])


# ---- Trees ----------------------------------------------------------------------------------------------------------


def is_tree(heads) -> bool:
    graph = networkx.DiGraph((head, word) for word, head in enumerate(heads, start=1))
    return networkx.is_arborescence(graph) and list(heads).count(0) == 1


@pytest.mark.parametrize("words", [1, 2, 3, 4])
def test_tree_is_the_best_of_all(words):
    """Compared with an exhaustive search over all trees, mostly on scores whose greedy solution is not a tree."""
    generator = torch.Generator().manual_seed(words)
    trees = [heads for heads in itertools.product(range(words + 1), repeat=words) if is_tree(heads)]
    assert len(trees) == words ** (words - 1)
    for _ in range(25):
        scores = torch.randn(words, words + 1, generator=generator) * 3
        best = max(trees, key=lambda heads: sum(scores[word, head].item() for word, head in enumerate(heads)))
        assert decode_tree(scores) == list(best)


@pytest.mark.parametrize("words", [5, 20, 40])
def test_tree_of_a_long_sentence_has_one_root_and_the_sum_that_another_search_finds(words):
    scores = torch.randn(words, words + 1, generator=torch.Generator().manual_seed(words), dtype=torch.float64)
    scores[:, 0] += 9  # the greedy solution attaches each word to the root
    graph = networkx.DiGraph()
    for word, row in enumerate(scores.tolist(), start=1):
        # The root costs so much that only one word is attached to it.
        arcs = enumerate([row[0] - 1000, *row[1:]])
        graph.add_weighted_edges_from((head, word, score) for head, score in arcs if head != word)
    best = networkx.maximum_spanning_arborescence(graph)
    heads = decode_tree(scores)
    assert is_tree(heads)
    assert heads == [next(best.predecessors(word)) for word in range(1, words + 1)]


def test_tree_takes_lists_leaves_its_argument_alone_and_may_be_empty():
    assert decode_tree([[0.0, 9.0, 1.0], [2.0, 0.0, 9.0]]) == [2, 0]
    scores = torch.tensor([[5.0, 0.0, 0.0], [5.0, 1.0, 0.0]])
    before = scores.clone()
    assert decode_tree(scores) == [0, 1] and torch.equal(scores, before)
    assert decode_tree(torch.zeros(0, 1)) == []


def test_tree_of_what_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="nan"):
        decode_tree([[0.0, 0.0, float("nan")], [0.0, 1.0, 0.0]])


@torch.no_grad()
def test_decoded_relations_are_those_at_the_decoded_heads(parser, inputs):
    parser.config.id2label = dict(enumerate(RELATIONS))
    output = parser(**inputs)
    for row, (heads, relations) in enumerate(parser.decode(output, inputs["word_starts"])):
        assert is_tree(heads) and len(heads) == len(relations) == (3, 4)[row % 2]
        for word, (head, relation) in enumerate(zip(heads, relations, strict=True)):
            assert relation == RELATIONS[output.relation_logits[row, word, head].argmax()]


# ---- Trainer --------------------------------------------------------------------------------------------------------


def test_trains_to_the_right_trees_evaluates_saves_and_loads(backbone, rows, collator, tmp_path):
    names = {"id2label": dict(enumerate(RELATIONS)), "num_labels": 5}
    model = KAdapterForDependencyParsing.from_backbone(backbone, adapters={"linguistic": small_adapter()}, **names)
    disturb(model.adapters)
    trainer = trainer_for(model, rows, tmp_path, collator, max_steps=60, per_device_eval_batch_size=2)
    assert trainer.label_names == ["head_labels", "relation_labels"]
    trainer.train()
    scores = trainer.evaluate()
    for name in ("uas", "las", "uas_without_punctuation", "las_without_punctuation"):
        assert scores[f"eval_{name}"] == 1.0
    trainer.save_model(tmp_path / "saved")
    loaded, info = KAdapterForDependencyParsing.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()) and loaded.config.id2label == dict(enumerate(RELATIONS))
    batch = collator(rows)
    with torch.no_grad():
        wanted, found = model.eval()(**batch), loaded(**batch)
    assert torch.equal(found.arc_logits, wanted.arc_logits) and torch.equal(found.loss, wanted.loss)
    assert torch.equal(found.relation_logits, wanted.relation_logits)
    parses = loaded.decode(found, batch["word_starts"])
    assert parses == [(heads, relations) for _, heads, relations in SENTENCES]


def test_micro_batches_of_sentences_of_different_lengths_give_the_steps_of_the_large_batch(
    build, rows, collator, tmp_path
):
    """With SGD, because Adam would turn rounding errors into full steps."""
    results = []
    for size in (4, 2, 1):
        model = build(KAdapterForDependencyParsing, num_labels=5, classifier_dropout=0.0)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        steps = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        steps["learning_rate"] = 0.05 * (4 // size if DIVIDES_GRADIENTS_AGAIN else 1)
        trainer = trainer_for(model, rows, tmp_path, collator, optim="sgd", max_grad_norm=1e9, **steps)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((losses, {name: p for name, p in model.named_parameters() if p.requires_grad}))
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-3)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, results[0][1][name], rtol=1e-4, atol=1e-5, msg=name)


# ---- Code that travels ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_class_is_found_by_its_name_in_a_saved_folder(parser, inputs, tmp_path):
    parser.save_pretrained(tmp_path)
    reference = json.loads((tmp_path / "config.json").read_text())["auto_map"]["KAdapterForDependencyParsing"]
    travelled = get_class_from_dynamic_module(reference, tmp_path)
    model = travelled.from_pretrained(tmp_path)
    assert travelled is not KAdapterForDependencyParsing
    wanted, found = parser(**inputs), model(**inputs)
    assert torch.equal(found.arc_logits, wanted.arc_logits)
    assert model.decode(found, inputs["word_starts"]) == parser.decode(wanted, inputs["word_starts"])
