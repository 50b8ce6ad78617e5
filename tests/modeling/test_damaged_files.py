"""Missing, damaged, forged or foreign files of a K-Adapter are refused with a helpful message."""

import json
import re
import resource
import struct

import pytest
import torch
from conftest import assert_same_weights, disturb, small_adapter
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, set_seed

from kadapter_hf import KAdapterConfigError, KAdapterForSequenceClassification, KAdapterLoadError, KAdapterModel
from kadapter_hf.modeling.reading_kadapter import check_tensors, read_adapter, read_file


INDEX = "model.safetensors.index.json"
FACTUAL, LINGUISTIC = "adapters/factual.safetensors", "adapters/linguistic.safetensors"
WEIGHT_FILES = (FACTUAL, LINGUISTIC, "head.safetensors", "backbone.safetensors")
READERS = (KAdapterForSequenceClassification, AutoModelForSequenceClassification)
WAY_OUT = re.compile(
    r"[Dd]ownload or save|load_knowledge_adapter|save_knowledge_adapter|correct the field|from_backbone"
)


def saved_model(backbone, folder, seed, names=("factual", "linguistic")):
    """A classifier that stores its backbone, so that its folder has every kind of file."""
    set_seed(seed)
    adapters = {name: small_adapter(backbone_layers=[0]) for name in names}
    model = KAdapterForSequenceClassification.from_backbone(backbone, adapters=adapters, num_labels=3)
    disturb(model, seed)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def original(backbone, tmp_path_factory):
    """A saved model, and its folder."""
    folder = tmp_path_factory.mktemp("original") / "model"
    return saved_model(backbone, folder, 0), folder


@pytest.fixture(scope="module")
def stranger(backbone, tmp_path_factory):
    """The folder of another model, of the same sizes and with the same names."""
    folder = tmp_path_factory.mktemp("stranger") / "model"
    saved_model(backbone, folder, 1)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy to damage."""
    copy = tmp_path / "model"
    for path in (path for path in original[1].rglob("*") if path.suffix in (".safetensors", ".json")):
        target = copy / path.relative_to(original[1])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return copy


def assert_refused(folder, *words, readers=(AutoModelForSequenceClassification,)):
    """Loading with the Auto class, which calls the model class, fails with a helpful message."""
    for model_class in readers:
        with pytest.raises(KAdapterLoadError) as caught:
            model_class.from_pretrained(folder)
        for word in words:
            assert word in str(caught.value)
        assert WAY_OUT.search(str(caught.value)), caught.value


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite(path, change):
    """Changes the tensors or the metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    return tensors


def reindex(folder, file, tensors):
    """Updates the index for a file that was rewritten, as a forger would."""

    def change(index):
        index["weight_map"] = {name: place for name, place in index["weight_map"].items() if place != file}
        index["weight_map"] |= {name: file for name in tensors}
        del index["metadata"]["fingerprints"][file]

    edit_json(folder / INDEX, change)


# ---- Missing or incomplete files -----------------------------------------------------------------------------------------


def test_the_undamaged_folder_loads(original, folder):
    assert_same_weights(KAdapterForSequenceClassification.from_pretrained(folder), original[0])


@pytest.mark.parametrize("file", (INDEX, *WEIGHT_FILES))
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    assert_refused(folder, file, "missing", readers=READERS)


def test_a_missing_config_is_named(folder):
    (folder / "config.json").unlink()
    with pytest.raises(KAdapterLoadError, match="config.json' is missing.*Download or save"):
        KAdapterForSequenceClassification.from_pretrained(folder)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(KAdapterLoadError, match="nowhere' is neither a local file or folder nor a repository"):
        KAdapterForSequenceClassification.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("file", WEIGHT_FILES)
@pytest.mark.parametrize("kept", (0.0, 0.001, 0.1, 0.6, "all but a byte"))
def test_a_truncated_file_is_refused(folder, file, kept):
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: -1 if isinstance(kept, str) else int(kept * len(content))])
    assert_refused(folder, file, "damaged")


def test_a_file_with_more_bytes_than_its_header_says_is_refused(folder):
    with open(folder / FACTUAL, "ab") as file:
        file.write(b"\0")
    assert_refused(folder, FACTUAL, "damaged")


# ---- Flipped bits -------------------------------------------------------------------------------------------------------


def flips(path, step=1):
    """Flips every `step`th bit of a safetensors file's header and its length, one at a time; yields while it is flipped."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    with open(path, "rb+", buffering=0) as file:
        for bit in range(0, 8 * (8 + length), step):
            for byte in (content[bit // 8] ^ 1 << bit % 8, content[bit // 8]):
                file.seek(bit // 8)
                file.write(bytes([byte]))
                if byte != content[bit // 8]:
                    yield bit


def test_a_flipped_bit_of_an_adapter_header_is_refused_or_changes_nothing(folder):
    saved = read_adapter(folder / FACTUAL)
    expected = {name: tensor.clone() for name, tensor in saved.tensors.items()}
    refused = 0
    for bit in flips(folder / FACTUAL, step=3):  # each bit of a byte
        try:
            found = read_adapter(folder / FACTUAL)
            check_tensors(expected, found.tensors, folder / FACTUAL)
        except KAdapterLoadError as error:
            assert FACTUAL in str(error)
            refused += 1
            continue
        assert (found.name, found.config.to_json()) == (saved.name, saved.config.to_json()), bit
        assert found.tensors.keys() == expected.keys(), bit
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items()), bit
    assert refused > 0


@pytest.mark.parametrize("file, step", (("head.safetensors", 1), ("backbone.safetensors", 11)))
def test_a_flipped_bit_of_another_header_is_refused_or_changes_nothing(folder, file, step):
    index = json.loads((folder / INDEX).read_text())
    names = [name for name, place in index["weight_map"].items() if place == file]
    fingerprint = index["metadata"]["fingerprints"][file]
    expected = {name: tensor.clone() for name, tensor in read_file(folder, file, names, fingerprint).items()}
    refused = 0
    for bit in flips(folder / file, step):
        try:
            found = read_file(folder, file, names, fingerprint)
        except KAdapterLoadError as error:
            assert file in str(error)
            refused += 1
            continue
        assert found.keys() == expected.keys(), bit
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), bit
    assert refused > 0


def test_a_model_is_never_built_from_a_flipped_header(original, folder):
    for file in WEIGHT_FILES:
        for _ in flips(folder / file, step=997):
            try:
                model = KAdapterForSequenceClassification.from_pretrained(folder)
            except (KAdapterLoadError, KAdapterConfigError):
                continue
            assert_same_weights(model, original[0])


def test_an_adapter_is_never_added_from_a_flipped_header(original, folder, backbone):
    model = KAdapterModel.from_backbone(backbone)
    for _ in flips(folder / FACTUAL, step=97):
        try:
            name = model.load_knowledge_adapter(folder / FACTUAL, ignore_backbone_mismatch=True)
        except (KAdapterLoadError, KAdapterConfigError):
            assert list(model.adapters) == []
            continue
        assert name == "factual"
        assert_same_weights(model.adapters["factual"], original[0].adapters["factual"])
        model.delete_knowledge_adapter("factual")


# ---- The index ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place",
    (
        "elsewhere.safetensors",
        "../elsewhere.safetensors",
        "{tmp}/elsewhere.safetensors",
        "adapters/../../elsewhere.safetensors",
        "adapters\\..\\elsewhere.safetensors",
        "adapters/factual.safetensors",
        "",
        ".",
        None,
        7,
        ["head.safetensors"],
    ),
    ids=repr,
)
def test_an_index_that_leads_elsewhere_is_refused(folder, tmp_path, place):
    for target in (folder, tmp_path):  # there is something to find
        (target / "elsewhere.safetensors").write_bytes((folder / "head.safetensors").read_bytes())
    place = place.format(tmp=tmp_path) if isinstance(place, str) else place
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"fusion.bias": place}))
    assert_refused(folder, INDEX, "fusion.bias")


@pytest.mark.parametrize(
    "name", ("adapters.../../x.w", "adapters./tmp/x.w", "adapters.", "adapters..w", "adapters.a b.w")
)
def test_an_index_with_a_tensor_of_an_impossible_adapter_is_refused(folder, name):
    file = f"adapters/{name.split('.', 1)[1].rpartition('.')[0]}.safetensors"
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({name: file}))
    assert_refused(folder, INDEX, name, "can't name a knowledge adapter")


@pytest.mark.parametrize(
    "content",
    ("", "not JSON", "[]", "null", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000, "\udcff"),
    ids=lambda content: repr(content)[:20],
)
def test_an_index_that_is_none_is_refused(folder, content):
    (folder / INDEX).write_bytes(content.encode(errors="surrogateescape"))
    assert_refused(folder)


def test_an_index_that_lacks_a_tensor_is_refused(folder):
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop("fusion.bias"))
    assert_refused(folder, "head.safetensors", "fusion.bias")


def test_an_index_that_lacks_a_whole_adapter_is_refused(folder):
    def change(index):
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != FACTUAL}

    edit_json(folder / INDEX, change)
    assert_refused(folder, FACTUAL, "not in the index")


def test_an_index_that_lacks_the_head_is_refused_not_made_up_for(folder):
    def change(index):
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != "head.safetensors"}

    edit_json(folder / INDEX, change)
    assert_refused(folder, "head.safetensors", "fusion")


# ---- Tensors ------------------------------------------------------------------------------------------------------------

ONE_OF = {
    FACTUAL: "adapters.factual.layers.0.up_project.weight",
    "head.safetensors": "classifier.weight",
    "backbone.safetensors": "backbone.embeddings.word_embeddings.weight",
}


@pytest.mark.parametrize("forged", (False, True), ids=("index as saved", "index forged"))
@pytest.mark.parametrize("file", ONE_OF)
def test_a_missing_tensor_is_refused(folder, file, forged):
    tensors = rewrite(folder / file, lambda tensors, metadata: tensors.pop(ONE_OF[file]))
    if forged:
        reindex(folder, file, tensors)
    assert_refused(folder, file, *([ONE_OF[file].removeprefix("backbone.")] if file != FACTUAL else []))


@pytest.mark.parametrize("forged", (False, True), ids=("index as saved", "index forged"))
@pytest.mark.parametrize("file", ONE_OF)
def test_an_extra_tensor_is_refused(folder, file, forged):
    extra = ONE_OF[file].replace("weight", "surplus")
    tensors = rewrite(folder / file, lambda tensors, metadata: tensors.update({extra: torch.ones(3)}))
    if forged:
        reindex(folder, file, tensors)
    assert_refused(folder, file, *([extra.removeprefix("backbone.")] if file != FACTUAL else []))


@pytest.mark.parametrize("forged", (False, True), ids=("index as saved", "index forged"))
@pytest.mark.parametrize("file", ONE_OF)
def test_a_tensor_of_another_shape_is_refused(folder, file, forged):
    name = ONE_OF[file]
    tensors = rewrite(folder / file, lambda tensors, metadata: tensors.update({name: tensors[name][:-1].clone()}))
    if forged:
        reindex(folder, file, tensors)
    assert_refused(folder, file, "shape")


@pytest.mark.parametrize("file", ONE_OF)
def test_a_tensor_of_the_same_size_and_another_shape_is_refused(folder, file):
    name = ONE_OF[file]
    tensors = rewrite(folder / file, lambda tensors, metadata: tensors.update({name: tensors[name].t().contiguous()}))
    reindex(folder, file, tensors)
    assert_refused(folder, file, "shape")


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool), ids=str)
@pytest.mark.parametrize("file", ONE_OF)
def test_a_tensor_of_another_dtype_is_refused(folder, file, dtype):
    name = ONE_OF[file]
    rewrite(folder / file, lambda tensors, metadata: tensors.update({name: tensors[name].to(dtype)}))
    assert_refused(folder, file, "dtype")


@pytest.mark.parametrize("file", ONE_OF)
def test_a_tensor_with_other_values_is_refused(folder, file):
    def change(tensors, metadata):
        tensors[ONE_OF[file]].view(-1)[5] += 1e-3

    rewrite(folder / file, change)
    assert_refused(folder, file, "does not hold what was saved")


# ---- Adapter files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_model(backbone):
    """A model that could load the adapter if it were not damaged."""
    return KAdapterModel.from_backbone(backbone)


def assert_adapter_refused(model, path, *words):
    """The file is refused, and the model does not change."""
    with pytest.raises(KAdapterLoadError) as caught:
        model.load_knowledge_adapter(path, ignore_backbone_mismatch=True)
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert WAY_OUT.search(str(caught.value)) or "save it again" in str(caught.value), caught.value
    assert list(model.adapters) == model.active_knowledge_adapters == []


def set_metadata(path, value):
    def change(tensors, metadata):
        metadata.clear()
        metadata.update({"format": "pt"} if value is None else {"kadapter": value})

    rewrite(path, change)


@pytest.mark.parametrize(
    "value",
    (
        None,
        "",
        "not JSON",
        "[]",
        "{}",
        "3",
        '{"checksum": "", "format_version": 1, "name": "factual", "config": {}, "fingerprint": ""}',
        '{"checksum": "", "format_version": "1"}',
        "[" * 100_000,
    ),
    ids=lambda value: str(value)[:20],
)
def test_an_adapter_file_without_its_metadata_is_refused(folder, plain_model, value):
    set_metadata(folder / FACTUAL, value)
    assert_adapter_refused(plain_model, folder / FACTUAL, "metadata")
    assert_refused(folder, FACTUAL, "metadata") if value is None else None


@pytest.mark.parametrize("field", ("name", "config", "fingerprint", "format_version"))
def test_changed_metadata_is_refused(folder, plain_model, field):
    def change(tensors, metadata):
        content = json.loads(metadata["kadapter"])
        content[field] = {"name": "other", "config": {}, "fingerprint": "0" * 64, "format_version": 0}[field]
        metadata["kadapter"] = json.dumps(content, sort_keys=True)

    rewrite(folder / FACTUAL, change)
    assert_adapter_refused(plain_model, folder / FACTUAL, "metadata that was changed or damaged")


def test_a_file_that_is_not_an_adapter_is_refused(folder, plain_model):
    assert_adapter_refused(plain_model, folder / "head.safetensors", "not the file of a knowledge adapter")
    assert_adapter_refused(plain_model, folder / "nowhere.safetensors", "missing")


@pytest.mark.parametrize("change", ("missing", "extra", "shape", "dtype"))
def test_a_single_adapter_file_with_changed_tensors_is_refused(folder, plain_model, change):
    def damage(tensors, metadata):
        name = ONE_OF[FACTUAL]
        if change == "missing":
            del tensors[name]
        elif change == "extra":
            tensors[f"{name}2"] = torch.ones(2)
        else:
            tensors[name] = tensors[name].half() if change == "dtype" else tensors[name].t().contiguous()

    rewrite(folder / FACTUAL, damage)
    assert_adapter_refused(plain_model, folder / FACTUAL, "does not hold what was saved")


def test_an_adapter_file_of_another_model_is_refused(folder, stranger):
    (folder / FACTUAL).write_bytes((stranger / FACTUAL).read_bytes())
    assert_refused(folder, FACTUAL, "from different saves")


def test_adapter_files_that_changed_places_are_refused(folder):
    first, second = ((folder / file).read_bytes() for file in (FACTUAL, LINGUISTIC))
    (folder / FACTUAL).write_bytes(second)
    (folder / LINGUISTIC).write_bytes(first)
    assert_refused(folder, FACTUAL, "different saves")


@pytest.mark.parametrize("file", ("head.safetensors", "backbone.safetensors"))
def test_another_part_of_another_model_is_refused(folder, stranger, file):
    (folder / file).write_bytes((stranger / file).read_bytes())
    assert_refused(folder, file, "does not hold what was saved")


def test_the_index_of_another_model_is_refused(folder, stranger):
    (folder / INDEX).write_bytes((stranger / INDEX).read_bytes())
    assert_refused(folder, "adapters/")


def test_a_source_with_several_adapters_or_none_names_them(folder, plain_model, tmp_path):
    with pytest.raises(KAdapterLoadError, match=r"\['factual', 'linguistic'\], and no name was given"):
        plain_model.load_knowledge_adapter(folder)
    with pytest.raises(KAdapterLoadError, match=r"\['factual', 'linguistic'\], and there is no 'causal'"):
        plain_model.load_knowledge_adapter(folder, "causal")
    with pytest.raises(KAdapterLoadError, match="has no knowledge adapter: .*save_knowledge_adapter"):
        plain_model.load_knowledge_adapter(tmp_path)


# ---- config.json --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    (
        ("backbone_config", 3),
        ("backbone_config", {"model_type": "roberta", "hidden_size": "wide"}),
        ("backbone_config", {"model_type": "no-such-type"}),
        ("knowledge_adapters", ["factual"]),
        ("knowledge_adapters", {"factual": "linguistic"}),
        ("knowledge_adapters", {"factual": {"hidden_size": "wide"}}),
        ("knowledge_adapters", {"factual": {"hidden_size": -1}}),
        ("active_knowledge_adapters", "factual"),
        ("active_knowledge_adapters", [1]),
        ("active_knowledge_adapters", ["causal"]),
        ("frozen_knowledge_adapters", {"factual": True}),
        ("fusion", "multiply"),
        ("fusion", None),
        ("freeze_backbone", "yes"),
        ("classifier_dropout", "0.1"),
        ("classifier_dropout", 7),
        ("backbone_name_or_path", 5),
        ("backbone_fingerprint", ["a"]),
        ("dtype", "float99"),
    ),
    ids=str,
)
def test_a_field_of_the_wrong_type_is_named(folder, field, value):
    edit_json(folder / "config.json", lambda config: config.update({field: value}))
    for model_class in READERS:
        with pytest.raises(KAdapterConfigError, match=field):
            model_class.from_pretrained(folder)
    with pytest.raises(KAdapterConfigError, match="(?s)config.json.*correct the field"):
        KAdapterForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    "name", ("../../x", "/tmp/x", "..", "", "a.b", "a/b", "a\\b", "a\0b", "x" * 65, "forward", "é")
)
def test_an_adapter_whose_name_leads_elsewhere_is_refused(folder, tmp_path, name):
    def change(config):
        config["knowledge_adapters"][name] = config["knowledge_adapters"].pop("factual")
        config["active_knowledge_adapters"] = ["linguistic"]

    edit_json(folder / "config.json", change)
    if name == "../../x":  # there is something to find
        (tmp_path.parent / "x.safetensors").write_bytes((folder / FACTUAL).read_bytes())
    for model_class in READERS:
        with pytest.raises(KAdapterConfigError, match="can't name a knowledge adapter"):
            model_class.from_pretrained(folder)


MEGABYTES = 10 * 2**20
JUNK = {
    "random bytes": torch.randint(256, (MEGABYTES,), dtype=torch.uint8).numpy().tobytes,
    "zeros": lambda: bytes(MEGABYTES),
    "one string": lambda: json.dumps("x" * MEGABYTES).encode(),
    "a list": lambda: json.dumps(list(range(MEGABYTES // 8))).encode(),
    "nested lists": lambda: b"[" * (MEGABYTES // 2) + b"]" * (MEGABYTES // 2),
    "nested objects": lambda: b'{"a":' * (MEGABYTES // 6) + b"1" + b"}" * (MEGABYTES // 6),
    "a long number": lambda: b'{"model_type": ' + b"9" * MEGABYTES + b"}",
    "an object of junk": lambda: json.dumps({f"field_{i}": "x" * 1000 for i in range(MEGABYTES // 1000)}).encode(),
}


@pytest.mark.parametrize("kind", JUNK)
def test_a_config_of_ten_megabytes_of_junk_is_refused(folder, kind):
    (folder / "config.json").write_bytes(JUNK[kind]())
    with pytest.raises(KAdapterLoadError) as caught:
        KAdapterForSequenceClassification.from_pretrained(folder)
    assert str(folder) in str(caught.value) and WAY_OUT.search(str(caught.value))
    assert len(str(caught.value)) < 1000


def test_ten_megabytes_of_unknown_fields_change_nothing(original, folder):
    """They may be from a newer version."""
    junk = {f"field_{i}": "x" * 1000 for i in range(MEGABYTES // 1000)}
    edit_json(folder / "config.json", lambda config: config.update(junk=junk, **dict(list(junk.items())[:100])))
    assert_same_weights(KAdapterForSequenceClassification.from_pretrained(folder), original[0])


def test_a_config_beyond_all_measure_is_refused_unread(folder):
    with open(folder / "config.json", "rb+") as file:
        file.truncate(2**40)  # uses no space on disk
    with pytest.raises(KAdapterLoadError, match="larger than 64 MB"):
        KAdapterForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("content", (b"", b"{", b"null", b"3", b'"kadapter"', b"[]", b"\xff\xfe", b"{}"), ids=repr)
def test_a_config_that_is_none_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(KAdapterLoadError) as caught:
        KAdapterForSequenceClassification.from_pretrained(folder)
    assert str(folder) in str(caught.value) and WAY_OUT.search(str(caught.value))


def test_a_config_that_is_a_folder_is_refused(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(KAdapterLoadError, match="config.json"):
        KAdapterForSequenceClassification.from_pretrained(folder)


def test_another_kind_of_model_is_refused(backbone):
    with pytest.raises(KAdapterLoadError, match="'roberta' model, not a K-Adapter.*from_backbone"):
        KAdapterForSequenceClassification.from_pretrained(backbone)


def test_a_config_that_lacks_an_adapter_of_the_folder_is_refused(folder):
    def change(config):
        del config["knowledge_adapters"]["factual"]
        config["active_knowledge_adapters"] = ["linguistic"]

    edit_json(folder / "config.json", change)
    assert_refused(folder, FACTUAL, "don't agree", readers=READERS)


def test_a_config_with_one_adapter_more_than_the_folder_is_refused(folder):
    edit_json(
        folder / "config.json",
        lambda config: config["knowledge_adapters"].update(causal=config["knowledge_adapters"]["factual"]),
    )
    assert_refused(folder, "adapters/causal.safetensors", "missing", readers=READERS)


@pytest.mark.parametrize(
    "field, value", (("num_hidden_layers", 9999), ("hidden_size", 16 * 10**9), ("hidden_act", "relu"))
)
def test_a_config_that_differs_from_an_adapter_file_is_refused_before_anything_is_built(folder, field, value):
    edit_json(folder / "config.json", lambda config: config["knowledge_adapters"]["factual"].update({field: value}))
    assert_refused(folder, FACTUAL, "don't agree", readers=READERS)


@pytest.mark.parametrize(
    "field, value, word",
    (
        ("vocab_size", 10**7, "word_embeddings"),
        ("num_hidden_layers", 10**4, "10000 layers"),
        ("hidden_size", 10**6, "shape"),
    ),
)
def test_a_config_that_asks_for_a_huge_backbone_is_refused_before_it_takes_memory(folder, field, value, word):
    edit_json(folder / "config.json", lambda config: config["backbone_config"].update({field: value}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(folder, "backbone.safetensors", word, readers=READERS)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10  # KiB


@pytest.mark.parametrize("field, value", (("num_labels", 10**12), ("num_labels", 0), ("num_hidden_layers", 10**12)))
def test_a_config_that_counts_without_end_is_refused(folder, field, value):
    original = (folder / "config.json").read_text()
    for change in (
        lambda config: config.update({field: value}),
        lambda config: config["backbone_config"].update({field: value}),
    ):
        (folder / "config.json").write_text(original)
        edit_json(folder / "config.json", change)
        with pytest.raises(KAdapterConfigError, match=f"(?s)config.json.*{field} must be between 1 and"):
            KAdapterForSequenceClassification.from_pretrained(folder)
