"""The model card: its content, its runnable snippet, and the preservation of a user's edits."""

import logging
import os
import re

import pytest
import yaml
from conftest import assert_same_weights, disturb, small_adapter
from huggingface_hub import ModelCard

from kadapter_hf import KAdapterForRelationClassification, KAdapterModel, cards
from kadapter_hf.card_content import make_card
from kadapter_hf.cards import card_text, merge_card


PROVENANCE = {
    "objective": "factual",
    "corpus": "user/facts",
    "dataset": "user/facts",
    "language": "en",
    "license": "cc-by-sa-4.0",
    "rows": 1200,
    "metrics": {"eval_micro_f1": 0.7771, "eval_macro_f1": 0.42, "eval_loss": 1.5},
    "training": [{"epoch": 1.0, "step": 40, "loss": 2.0, "eval_loss": 1.5, "eval_micro_f1": 0.7771}],
}


@pytest.fixture
def model(build):
    """With a backbone from the Hub, for which the card has more information than for a local folder."""
    model = build(adapters=[])
    model.config.backbone_name_or_path = "user/small-encoder"
    model.config.backbone_revision = "a" * 40
    model.add_knowledge_adapter("factual", small_adapter(provenance=PROVENANCE))
    return model


def card_of(folder) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def change(folder, old: str, new: str) -> None:
    path = folder / "README.md"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_the_metadata_name_the_backbone_the_data_and_the_metrics(model):
    data = ModelCard(make_card(model.config, "user/facts-adapter", backbone_stored=False)).data
    assert data.base_model == "user/small-encoder" and data.base_model_relation == "adapter"
    assert data.library_name == "transformers" and {"k-adapter", "factual-knowledge"} <= set(data.tags)
    assert (data.language, data.license, data.datasets) == (["en"], "cc-by-sa-4.0", ["user/facts"])
    assert data.metrics == ["f1"] and data.model_name == "user/facts-adapter"
    results = {result.metric_name: result.metric_value for result in data.eval_results}
    assert results == {"micro f1": 0.7771, "macro f1": 0.42}


def test_a_model_with_a_backbone_of_its_own_is_a_fine_tuned_one(model):
    data = ModelCard(make_card(model.config, "user/model", backbone_stored=True)).data
    assert data.base_model == "user/small-encoder" and data.base_model_relation == "finetune"


def test_a_backbone_in_a_folder_is_no_base_model(build):
    model = build()
    text = make_card(model.config, None, backbone_stored=False)
    assert "base_model" not in text and os.path.dirname(model.config.backbone_name_or_path) not in text


def test_it_shows_the_training_the_fingerprint_and_the_citation(model):
    text = make_card(model.config, "user/facts-adapter", backbone_stored=False)
    assert "| rows | 1200 |" in text
    assert (
        "| epoch | step | loss | held-out loss | micro f1 |\n|---|---|---|---|---|\n| 1 | 40 | 2 | 1.5 | 0.7771 |"
        in text
    )
    assert "| factual | macro f1 | 0.4200 |" in text
    assert model.config.backbone_fingerprint in text and "a" * 40 in text
    assert "@inproceedings{wang-etal-2021-k," in text


def test_what_is_not_known_is_said_so(build):
    text = make_card(build(adapters=["factual"]).config, None, backbone_stored=False)
    assert text.count("Not recorded.") == 2
    assert "model-index" not in text and "license" not in text


def test_words_of_the_provenance_break_no_table(build):
    model = build(adapters=[])
    provenance = {"corpus": "a | b\n\n# Title <script> [x](http://y)", "metrics": "none", "training": [1]}
    model.add_knowledge_adapter("factual", small_adapter(provenance=provenance))
    text = make_card(model.config, None, backbone_stored=False)
    assert r"| corpus | a \| b # Title \<script\> \[x\](http://y) |" in text


@pytest.mark.parametrize("model_class", (KAdapterModel, KAdapterForRelationClassification))
def test_the_snippet_runs_as_printed(build, model_class, tmp_path, monkeypatch, capsys):
    """In the folder itself, with the backbone in a folder elsewhere."""
    build(model_class).save_pretrained(tmp_path / "model")
    code = re.search(r"```python\n(.*?)```", (tmp_path / "model" / "README.md").read_text(), re.DOTALL)[1]
    assert model_class.__name__ in code
    monkeypatch.chdir(tmp_path / "model")
    exec(code, {})  # hub/test_hub_pushes.py runs one in a separate process
    assert capsys.readouterr().out.startswith("torch.Size([1, ")


def test_saving_again_changes_nothing(model, tmp_path):
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == text


def test_what_a_user_has_not_changed_follows_the_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    model.config.knowledge_adapters["factual"].provenance = PROVENANCE | {"rows": 5, "metrics": {"eval_micro_f1": 0.9}}
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| rows | 5 |" in text and "1200" not in text
    assert [result.metric_value for result in card_of(tmp_path).data.eval_results] == [0.9]


def test_sections_that_a_user_changed_added_or_removed_stay_so(model, tmp_path):
    model.save_pretrained(tmp_path)
    change(tmp_path, "| rows | 1200 |", "| rows | twelve hundred, of which I checked ten |")
    change(tmp_path, "## Backbone", "## Limits\n\nOnly rivers.\n\n## Backbone")
    text = (tmp_path / "README.md").read_text()
    citation = text[text.index("## Citation") : text.index("<!-- kadapter-hf")]
    change(tmp_path, citation, "")
    model.config.knowledge_adapters["factual"].provenance = PROVENANCE | {"rows": 5, "metrics": {"eval_micro_f1": 0.9}}
    for _ in range(2):
        model.save_pretrained(tmp_path)
        text = (tmp_path / "README.md").read_text().split("<!--")[0]
        assert "of which I checked ten" in text and "Only rivers." in text and "## Citation" not in text
        assert "| factual | micro f1 | 0.9000 |" in text  # a section that was not edited


def test_metadata_that_a_user_changed_added_or_removed_stay_so(model, tmp_path):
    model.save_pretrained(tmp_path)
    change(tmp_path, "license: cc-by-sa-4.0", "license: mit  # asked legal\ninference: false")
    change(tmp_path, "library_name: transformers\n", "")
    for rows in (1200, 5):
        model.config.knowledge_adapters["factual"].provenance = PROVENANCE | {"rows": rows}
        model.save_pretrained(tmp_path)
        text = (tmp_path / "README.md").read_text().split("<!--")[0]
        assert "license: mit  # asked legal\ninference: false" in text and "library_name" not in text
    model.config.knowledge_adapters["factual"].provenance = PROVENANCE | {"language": "de"}
    model.save_pretrained(tmp_path)
    data = card_of(tmp_path).data
    assert (data.license, data.language, data.library_name) == ("mit", ["de"], None)


def test_a_card_of_the_user_s_own_keeps_its_text_and_gets_the_metadata_it_lacks(model, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n# Mine\n\nAll of it.\n")
    for _ in range(2):
        model.save_pretrained(tmp_path)
        card = card_of(tmp_path)
        assert card.data.license == "mit" and card.data.base_model == "user/small-encoder"
        assert card.data.tags == ["mine", "k-adapter", "knowledge-adapter", "factual-knowledge"]
        assert card.text.split("<!--")[0].strip() == "# Mine\n\nAll of it."


def test_of_the_card_that_trainer_writes_the_training_is_kept(model, tmp_path):
    from transformers.modelcard import AUTOGENERATED_TRAINER_COMMENT

    trainers = (
        f"---\nlibrary_name: transformers\ntags:\n- generated_from_trainer\n---\n{AUTOGENERATED_TRAINER_COMMENT}\n# out\n\n"
        "## Model description\n\nMore information needed\n\n## Training procedure\n\n### Training results\n\n| a |\n|---|\n"
    )
    (tmp_path / "README.md").write_text(trainers)
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert "### Training results\n\n| a |" in card.text and "More information needed" not in card.text
    assert "## Use" in card.text and "generated_from_trainer" in card.data.tags
    assert card.data.base_model == "user/small-encoder"


@pytest.mark.parametrize("content", (b"---\na: [\n---\ntext", b"---\n- a\n---\n", b"\xff\xfe\x00 text"))
def test_a_card_that_can_t_be_read_stays_as_it_is(model, tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == content
    assert (tmp_path / "config.json").is_file()


def test_of_a_part_that_was_changed_here_and_on_the_hub_the_hub_s_is_kept(model, tmp_path):
    model.save_pretrained(tmp_path)
    hub = tmp_path / "hub"
    hub.mkdir()
    first = card_text(model.config, "user/repo", backbone_stored=False)
    (hub / "README.md").write_text(first.replace("Loading refuses", "HUB").replace("@inproceedings", "HUB CITE"))
    change(tmp_path, "Loading refuses", "LOCAL")
    change(tmp_path, "## Knowledge adapters\n", "## Knowledge adapters\n\nLOCAL TABLE\n")
    text = card_text(
        model.config, "user/repo", backbone_stored=False, earlier=[tmp_path / "README.md", hub / "README.md"]
    )
    assert "HUB" in text and "LOCAL a" not in text
    assert "LOCAL TABLE" in text and "HUB CITE" in text


def test_headings_in_code_begin_no_section():
    made = "---\na: 1\n---\n\n# x\n"
    old = "---\na: 1\n---\n\n# Mine\n\n```\n## not a heading\n```\n"
    assert yaml.safe_load(merge_card(old, made).split("---")[1]) == {"a": 1}
    assert "```\n## not a heading\n```" in merge_card(old, made)


def test_a_card_that_can_not_be_written_does_not_cost_the_weights(build, tmp_path, monkeypatch, caplog):
    model = build()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_bytes()
    disturb(model.adapters)
    monkeypatch.setattr(cards, "make_card", lambda *_: 1 / 0)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        model.save_pretrained(tmp_path)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "model card" in caplog.text and "ZeroDivisionError" in caplog.text
    assert (tmp_path / "README.md").read_bytes() == before
    assert_same_weights(type(model).from_pretrained(tmp_path), model)
