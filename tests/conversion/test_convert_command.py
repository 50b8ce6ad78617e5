"""The command `kadapter convert`, on small checkpoints in the original's format."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, batch, contents
from transformers import AutoModelForSequenceClassification, RobertaModel
from typer.testing import CliRunner

from kadapter_cli import app
from kadapter_hf import KAdapterForRelationClassification, KAdapterModel, KnowledgeAdapterConfig
from kadapter_hf.conversion import convert, verify
from kadapter_hf.conversion.original import Source, read_pretrained
from kadapter_hf.modeling.adapters_kadapter import KnowledgeAdapter
from kadapter_hf.modeling.format_kadapter import KAdapterLoadError


WIDTH = TINY["roberta"].hidden_size
ADAPTER_FILE = "used: adapters/factual.safetensors"
REFERENCE = Path(__file__).parents[1] / "fixtures" / "reference" / "reference_outputs.json"


def linear(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.randn(rows, columns), f"{name}.bias": torch.randn(rows)}


def adapter(before: str = "") -> dict[str, torch.Tensor]:
    """Two adapter layers of one transformer layer, of sizes that are no defaults."""
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "num_hidden_layers": 1}
    module = KnowledgeAdapter(KnowledgeAdapterConfig(backbone_layers=[0, 2], **sizes), WIDTH)
    names = {name: name.replace("layers.", "adapter.", 1) for name in module.state_dict()}
    return {f"{before}{names[name]}": torch.randn_like(tensor) for name, tensor in module.state_dict().items()}


def factual() -> dict[str, torch.Tensor]:
    head = linear("dense", WIDTH, 2 * WIDTH) | linear("out_proj", 5, WIDTH)
    return adapter() | linear("com_dense", WIDTH, 2 * WIDTH) | head


def linguistic() -> dict[str, torch.Tensor]:
    content = adapter() | linear("com_dense", WIDTH, 2 * WIDTH)
    for layer in ("self.query", "self.key", "self.value", "output.dense"):
        content |= linear(f"self_attention.{layer}", WIDTH, WIDTH)
    norm = {f"self_attention.output.LayerNorm.{kind}": torch.randn(WIDTH) for kind in ("weight", "bias")}
    return content | norm | linear("dense", WIDTH, WIDTH) | linear("out_proj", 64, WIDTH)


def fine_tuned(labels: int = 9) -> dict[str, torch.Tensor]:
    content = adapter("fac_adapter.") | adapter("lin_adapter.")
    for name in ("task_dense_lin", "task_dense_fac", "task_dense"):
        content |= linear(name, WIDTH, 2 * WIDTH)
    return content | linear("dense", WIDTH, WIDTH) | linear("out_proj", labels, WIDTH)


def backbone_file(folder) -> dict[str, torch.Tensor]:
    return {f"model.{name}": tensor for name, tensor in RobertaModel.from_pretrained(folder).state_dict().items()}


@pytest.fixture
def save(tmp_path):
    """`save(content)`: the path of a checkpoint, as torch wrote it when the original was released."""

    def save(content, name="pytorch_model.bin", zipped=False):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
        return tmp_path / name

    return save


@pytest.fixture
def config_only(tmp_path) -> Path:
    """A folder that has the backbone's config.json and no weights."""
    TINY["roberta"].save_pretrained(tmp_path / "config-only")
    return tmp_path / "config-only"


def run(*arguments):
    small = ["--layers", "0,2", "--heads", 3]
    return CliRunner().invoke(app, ["convert", *map(str, [*small, *arguments])], env={"COLUMNS": "600"})


def rows(text: str) -> list[list[str]]:
    """The rows of the tables in a report."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def words(text: str) -> str:
    """Without the frame of a table, and in one line."""
    return " ".join(text.replace("│", " ").replace("┃", " ").split())


@pytest.mark.parametrize("zipped", [False, True], ids=["as torch 1.3 wrote it", "as torch writes it now"])
def test_an_adapter_becomes_a_repository_like_one_that_is_saved(save, tmp_path, backbone, config_only, zipped):
    result = run(save(factual(), zipped=zipped), "--output", tmp_path / "out", "--backbone", config_only)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())["knowledge_adapters"]["factual"]
    found = {key: config[key] for key in ("backbone_layers", "hidden_size", "intermediate_size", "num_hidden_layers")}
    assert found == {
        "backbone_layers": [0, 2],
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
    }
    assert config["num_attention_heads"] == 3 and config["attend_to_padding"]
    model = KAdapterModel.from_pretrained(tmp_path / "out", backbone=backbone)
    model.save_pretrained(tmp_path / "saved")
    assert contents(tmp_path / "saved").keys() == contents(tmp_path / "out").keys()
    model.save_knowledge_adapter(tmp_path / "alone.safetensors", "factual")
    file = tmp_path / "out" / "adapters" / "factual.safetensors"
    assert (tmp_path / "alone.safetensors").read_bytes() == file.read_bytes()


def test_the_tensors_of_the_released_checkpoints_are_all_accounted_for():
    shapes = json.loads(REFERENCE.read_text())
    for kind, head in (("factual", 6), ("linguistic", 16)):
        tensors = {name: torch.zeros(shape) for name, shape in shapes[f"released_{kind}_checkpoint"].items()}
        source = Source(Path("pytorch_model.bin"), tensors)
        parts = read_pretrained(source, None, False, [0, 11, 22], 12)
        source.check_all_known()
        assert list(parts.kinds.items()) == [(kind, kind)] and parts.width == 1024
        assert len(source.targets) == 108 and len(source.left_out) == head


def test_with_weights_at_hand_the_adapter_names_their_fingerprint(save, tmp_path, backbone, caplog):
    convert(save(factual()), tmp_path / "out", layers=[0, 2], heads=3, backbone=backbone)
    expected = KAdapterModel.from_backbone(backbone).config.backbone_fingerprint
    model = KAdapterModel.from_pretrained(tmp_path / "out")
    assert model.config.backbone_fingerprint == expected
    assert model.config.knowledge_adapters["factual"].backbone_fingerprint == expected
    assert "verified" not in caplog.text


def test_without_weights_both_ways_to_load_say_that_the_backbone_is_not_verified(
    save, tmp_path, backbone, config_only, caplog
):
    out = tmp_path / "out"
    result = run(save(factual()), "--output", out, "--backbone", config_only)
    assert "could not be verified" in result.output
    KAdapterModel.from_pretrained(out, backbone=backbone)
    assert "could not be verified" in caplog.text
    caplog.clear()
    model = KAdapterModel.from_backbone(backbone, adapters=out)
    assert "could not be verified" in caplog.text
    model.save_pretrained(tmp_path / "again")
    adapters = [folder / "adapters" / "factual.safetensors" for folder in (out, tmp_path / "again")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()  # so saving does not make it look verified


def test_the_same_input_gives_the_same_bytes(save, tmp_path, config_only):
    path = save(factual())
    for name in ("one", "two"):
        assert run(path, "--output", tmp_path / name, "--backbone", config_only).exit_code == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_without_its_head_the_adapter_starts_beside_the_backbones_own_state(save, tmp_path, backbone):
    convert(save(factual()), tmp_path / "out", layers=[0, 2], heads=3, backbone=backbone)
    output = KAdapterModel.from_pretrained(tmp_path / "out")(input_ids=torch.tensor([[0, 9, 8, 2]]))
    torch.testing.assert_close(output.last_hidden_state, output.backbone_last_hidden_state)


@pytest.mark.parametrize("fusion", ["gate", "attention"])
def test_converted_adapters_are_combined_by_any_fusion(fusion, save, tmp_path, backbone):
    sources = []
    for name, content in (("factual", factual()), ("linguistic", linguistic())):
        convert(save(content, name), tmp_path / f"{name}-adapter", layers=[0, 2], heads=3, backbone=backbone)
        sources.append(str(tmp_path / f"{name}-adapter"))
    command = ["combine", *sources, "--fusion", fusion, "--output", str(tmp_path / "both")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    model, alone = KAdapterModel.from_pretrained(tmp_path / "both"), KAdapterModel.from_pretrained(sources[1])
    with torch.no_grad():
        found, wanted = (of_one(**batch()) for of_one in (model, alone))
    assert torch.equal(found.knowledge_states["linguistic"], wanted.knowledge_states["linguistic"])
    assert list(model(**batch(), output_fusion_weights=True).fusion_weights) == ["factual", "linguistic"]


def test_the_report_says_what_became_of_each_tensor(save, tmp_path, config_only):
    result = run(save(factual()), "--output", tmp_path / "out", "--backbone", config_only)
    used, left_out = rows(result.output)
    assert used == ["adapter.0.down_project.weight … adapter.1.up_project.bias", "40", "0.05", ADAPTER_FILE]
    names = "com_dense.weight, com_dense.bias, dense.weight, dense.bias, out_proj.weight, out_proj.bias"
    assert left_out[:2] == [names, "6"]
    assert left_out[3] == "left out: the head of the factual pre-training; --with-head keeps it"


def test_the_linguistic_head_is_named_as_left_out(save, tmp_path, config_only):
    out = tmp_path / "out"
    content = linguistic()
    result = run(save(content), "--output", out, "--backbone", config_only, "--with-head")
    assert result.exit_code == 0, result.output
    _, left_out = rows(result.output)
    assert left_out[0].split(", ") == [name for name in content if not name.startswith("adapter.")]
    assert left_out[3] == "left out: the head of the linguistic pre-training, which has no counterpart here"
    assert (out / "adapters" / "linguistic.safetensors").exists()


def test_the_name_can_be_chosen(save, tmp_path, config_only):
    run(save(factual()), "--output", tmp_path / "out", "--backbone", config_only, "--name", "wikidata", "--with-head")
    assert [path.stem for path in (tmp_path / "out" / "adapters").iterdir()] == ["wikidata"]


def test_verify_says_how_many_tensors_it_compared(save, tmp_path, config_only):
    content = factual()
    result = run(save(content), "--output", tmp_path / "out", "--backbone", config_only, "--with-head", "--verify")
    assert f"Verified: {len(content)} tensors" in result.output


def test_verify_finds_a_changed_tensor(save, tmp_path, config_only):
    made = convert(save(factual()), tmp_path / "out", layers=[0, 2], heads=3, backbone=config_only)
    with (made.output / "adapters" / "factual.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x00")
    with pytest.raises(KAdapterLoadError, match=r"tensor 'adapters\.factual.* is not equal to 'adapter"):
        verify(made)


@pytest.mark.parametrize("labels", [9, 113], ids=["OpenEntity", "FIGER"])
def test_a_fine_tuned_model_keeps_its_changed_backbone(save, tmp_path, backbone, labels):
    changed = backbone_file(backbone)
    changed["model.encoder.layer.1.output.dense.bias"] += 1
    path, weights = save(fine_tuned(labels), "pytorch_task_model.bin"), save(changed, "pytorch_pretrained_model.bin")
    out = tmp_path / "out"
    result = run(path, "--output", out, "--backbone", backbone, "--backbone-weights", weights, "--verify")
    assert result.exit_code == 0, result.output
    left_out = [
        "model.pooler.dense.weight, model.pooler.dense.bias",
        "2",
        "0.00",
        "left out: the pooler is not used",
    ]
    assert left_out in rows(result.output)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.num_labels == labels and model.config.problem_type == "multi_label_classification"
    assert model.config.frozen_knowledge_adapters == ["factual", "linguistic"]
    bias = model.backbone.encoder.layer[1].output.dense.bias
    assert torch.equal(bias, changed["model.encoder.layer.1.output.dense.bias"])


def test_the_labels_and_markers_of_a_task_are_recorded(save, tmp_path, backbone):
    weights = save(backbone_file(backbone), "pytorch_pretrained_model.bin")
    out = tmp_path / "out"
    arguments = ("--output", out, "--backbone", backbone, "--backbone-weights", weights, "--task", "open-entity")
    result = run(save(fine_tuned()), *arguments)
    assert result.exit_code == 0, result.output
    config = AutoModelForSequenceClassification.from_pretrained(out).config
    assert config.task == {"name": "open-entity", "schema": "typing", "max_length": 256, "marker": " @"}
    assert [config.id2label[number] for number in (0, 7)] == ["entity", "person"]


def test_a_task_with_another_number_of_labels_is_refused(save, tmp_path, backbone):
    weights = save(backbone_file(backbone), "pytorch_pretrained_model.bin")
    arguments = ("--output", tmp_path / "out", "--backbone", backbone, "--backbone-weights", weights)
    result = run(save(fine_tuned(labels=5)), *arguments, "--task", "open-entity")
    assert result.exit_code == 2 and "the checkpoint has 5 labels, not 9" in words(result.output)


def test_a_backbone_that_was_not_changed_is_not_stored_twice(save, tmp_path, backbone):
    content = fine_tuned() | backbone_file(backbone)
    for name in ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"):
        del content[name]
    result = run(save(content), "--output", tmp_path / "out", "--backbone", backbone, "--verify")
    assert result.exit_code == 0, result.output
    assert "therefore not stored" in words(result.output)
    assert not (tmp_path / "out" / "backbone.safetensors").exists()
    KAdapterModel.from_pretrained(tmp_path / "out")


def test_an_adapter_that_concat_does_not_read_is_named_as_left_out(save, tmp_path, config_only, backbone):
    path = save(fine_tuned() | adapter("et_adapter."))
    weights = save(backbone_file(backbone), "backbone.bin")
    out = tmp_path / "out"
    result = run(path, "--output", out, "--backbone", config_only, "--backbone-weights", weights)
    left_out = next(row for row in rows(result.output) if row[3].endswith("its concat fusion does not read it"))
    assert left_out[:2] == ["et_adapter.adapter.0.down_project.weight … et_adapter.adapter.1.up_project.bias", "40"]
    assert sorted(path.stem for path in (out / "adapters").iterdir()) == ["factual", "linguistic"]


def without(name):
    return lambda content: content.pop(name) is None


def shaped(name, *shape):
    return lambda content: content.update({name: torch.randn(shape)})


def added(name, *shape):
    return shaped(name, *(shape or (3,)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without("adapter.1.up_project.bias"), "'adapter.1.up_project.bias' is missing"),
        (without("adapter.0.down_project.weight"), "'adapter.0.down_project.weight' is missing"),
        (without("com_dense.bias"), "'com_dense.bias' is missing"),
        (lambda content: [content.pop(n) for n in list(content) if "adapter.0." in n], "'adapter.0.…' are missing"),
        (added("extra.weight"), "'extra.weight' is not one"),
        (added("adapter.1.encoder.layer.0.extra"), "'adapter.1.encoder.layer.0.extra' is not one"),
        (added("adapter.99999999999.x"), "'adapter.99999999999.x' is not one"),
        (added("adapter.9999.x"), "'adapter.2.…' are missing"),
        (shaped("adapter.0.up_project.weight", WIDTH, 23), r"'adapter.0.up_project.weight' has shape \(32, 23\)"),
        (shaped("adapter.0.down_project.weight", 24), r"'adapter.0.down_project.weight' has the impossible shape"),
        (shaped("dense.weight", WIDTH, WIDTH), r"'dense.weight' has shape \(32, 32\)"),
        (shaped("out_proj.weight", 0, WIDTH), "'out_proj.weight' has the impossible shape"),
        (lambda content: content.update({"dense.bias": torch.arange(WIDTH)}), "'dense.bias' does not hold plain"),
        (
            lambda content: content.update({"dense.bias": torch.zeros(1).expand(WIDTH)}),
            "'dense.bias' does not hold plain",
        ),
    ],
)
def test_a_missing_unknown_or_impossible_tensor_is_named(save, tmp_path, config_only, change, named):
    content = factual()
    change(content)
    with pytest.raises(KAdapterLoadError, match=named):
        convert(save(content), tmp_path / "out", layers=[0, 2], heads=3, backbone=config_only)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layers", "0,1,2"], "has 2 adapter layers, but --layers names 3"),
        (["--layers", "0,22"], "has hidden states 0 to 4"),
        (["--heads", 5], r"must divide hidden_size"),
        (["--name", "a/b"], "can't name a knowledge adapter"),
        (["--backbone", "FacebookAI/roberta-large"], "of width 32, but 'FacebookAI/roberta-large' has width 1024"),
        (["--backbone-weights", "x.bin"], "is a single adapter, which has no backbone weights"),
    ],
)
def test_an_argument_that_does_not_fit_is_wrong_usage(save, tmp_path, config_only, arguments, said):
    result = run(save(factual()), "--output", tmp_path / "out", "--backbone", config_only, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ") and said in result.stderr
    assert "Traceback" not in result.output


def test_a_backbone_that_can_not_be_found_is_no_wrong_usage(save, tmp_path):
    result = run(save(factual()), "--output", tmp_path / "out", "--backbone", "nowhere")
    assert result.exit_code == 1
    assert "Error: the configuration of the backbone 'nowhere' can't be read" in result.stderr


@pytest.mark.parametrize(
    ("content", "arguments", "code", "said"),
    [
        (fine_tuned, [], 1, "pass that file with --backbone-weights"),
        (fine_tuned, ["--name", "mine"], 2, "whose names are fixed"),
        (fine_tuned, ["--backbone-weights", "{path}"], 1, "no tensor's name starts with 'model.'"),
        (
            lambda: fine_tuned() | linear("fac_adapter.task_dense", WIDTH, 2 * WIDTH),
            [],
            1,
            "'fac_adapter.task_dense.weight' is a fusion inside an adapter",
        ),
        (
            lambda: fine_tuned() | {"model.x": torch.ones(1)},
            [],
            1,
            "'model.embeddings.word_embeddings.weight' is missing",
        ),
        (
            lambda: fine_tuned() | {"model.x": torch.ones(1)},
            ["--backbone-weights", "{path}"],
            2,
            "includes a backbone",
        ),
        (
            lambda: {"bert.encoder.layer.0.output.dense.weight": torch.ones(2, 2)},
            [],
            1,
            "a checkpoint of something else",
        ),
    ],
)
def test_a_fine_tuned_model_that_is_not_whole_is_refused(save, tmp_path, config_only, content, arguments, code, said):
    path = save(content())
    arguments = [argument.format(path=path) for argument in arguments]
    result = run(path, "--output", tmp_path / "out", "--backbone", config_only, *arguments)
    assert result.exit_code == code
    assert said in result.stderr


def test_a_folder_with_files_in_it_is_refused_and_left_as_it_is(save, tmp_path, config_only):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    result = run(save(factual()), "--output", out, "--backbone", config_only)
    assert result.exit_code == 1 and "is not empty" in result.stderr
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_the_head_is_found_by_the_class_that_has_it(save, tmp_path, backbone, caplog):
    convert(save(factual()), tmp_path / "out", layers=[0, 2], heads=3, backbone=backbone, with_head=True)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(model) is KAdapterForRelationClassification and model.config.num_labels == 5
    assert "new and untrained" not in caplog.text


def test_json_names_each_tensor_and_what_became_of_it(save, tmp_path, config_only):
    path = save(factual())
    result = run(path, "--output", tmp_path / "out", "--backbone", config_only, "--verify", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    [source] = found["sources"]
    assert (found["class"], found["output"], source["file"]) == ("KAdapterModel", str(tmp_path / "out"), str(path))
    assert source["used"].keys() | source["left_out"].keys() == factual().keys()
    assert found["verified"] == len(source["used"]) and "--with-head" in " ".join(source["left_out"].values())
    assert (
        found["files"].keys() == {"adapters/factual.safetensors", "head.safetensors"} and not found["backbone_known"]
    )
    assert all(size == (tmp_path / "out" / file).stat().st_size for file, size in found["files"].items())


def test_help_says_what_the_files_do_not_tell_and_has_an_example():
    text = words(CliRunner().invoke(app, ["convert", "--help"], env={"COLUMNS": "200"}).output)
    assert "0,11,22" in text and "0,11,23" in text
    assert "kadapter convert fac-adapter/pytorch_model.bin --output factual-adapter" in text
