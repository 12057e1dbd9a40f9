"""`vtc.retrieval` inside sentence-transformers and colpali-engine, where they are installed."""

import json

import pytest
import torch
from test_retrieval import page

from vtc.errors import InputError, OptionError
from vtc.retrieval import pool

LENGTHS = (7, 0, 31, 1, 31, 24)


def right_padded(pages):
    lengths = torch.tensor([len(x) for x in pages])
    padded = torch.nn.utils.rnn.pad_sequence(pages, batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tiny BERT with random weights, and its tokenizer, on disk."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


class TestSentenceTransformers:
    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip("sentence_transformers.multi_vector_encoder.modules")

    @pytest.fixture
    def pooling(self):
        from vtc.retrieval import TokenPooling

        return TokenPooling

    @pytest.fixture
    def encoder(self, words):
        from sentence_transformers import MultiVectorEncoder
        from sentence_transformers.sentence_transformer.modules import Normalize, Transformer

        def build(*more):
            modules = [Transformer(str(words)), Normalize(module_input_name="token_embeddings"), *more]
            return MultiVectorEncoder(modules=modules, device="cpu")

        return build

    documents = ["a b c d e f g h i", "a a a a", "q", "z y x w v u t s r q p o n m"]

    @pytest.mark.parametrize("options", [{}, {"factor": 2.5, "protect": 1}, {"method": "divprune"}, {"method": "ward"}])
    def test_forward_pool_and_pool_one_agree(self, pooling, options):
        pages = [page(n) for n in LENGTHS]
        module = pooling(**options)
        listed = module.pool(pages)
        ours = pool(pages, options.get("factor", 3), **{k: v for k, v in options.items() if k != "factor"})
        padded, mask = right_padded(pages)
        features = module({"token_embeddings": padded.clone(), "attention_mask": mask.long()})
        rows = [x[m] for x, m in zip(features["token_embeddings"], features["attention_mask"], strict=True)]
        for given, a, b, c in zip(pages, listed, ours, rows, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c) and torch.equal(a, module.pool_one(given))
        assert not features["token_embeddings"][~features["attention_mask"]].any()
        assert features["attention_mask"].dtype == torch.bool
        assert torch.equal(module.pool(padded, attention_mask=mask.long()), features["token_embeddings"])
        left = torch.stack([x.roll(padded.shape[1] - len(p), 0) for x, p in zip(padded, pages, strict=True)])
        for b, row in enumerate(module.pool(left, padding_side="left")):
            assert (
                torch.equal(row[len(row) - len(listed[b]) :], listed[b]) and not row[: len(row) - len(listed[b])].any()
            )

    @pytest.mark.parametrize("protect", [0, 1, 5])
    @pytest.mark.parametrize("tokens", [0, 1, 2, 5, 6, 9, 31])
    def test_ward_and_protected_tokens_are_theirs(self, pooling, tokens, protect):
        from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

        x = torch.nn.functional.normalize(torch.randn(tokens, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
        theirs = HierarchicalTokenPooling(3, num_protected_tokens=protect).pool_one(x)
        ours = pooling(3, method="ward", protect=protect).pool_one(x)
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours[:protect], theirs[:protect])
        a, b = (rows[protect:][rows[protect:, 0].argsort()] for rows in (ours, theirs))  # theirs are in no order
        torch.testing.assert_close(a, b)

    def test_only_its_tasks(self, pooling):
        pages = [page(9)]
        padded, mask = right_padded(pages)
        module = pooling()
        assert module.pool(pages, task="query") is pages
        features = {"token_embeddings": padded, "attention_mask": mask}
        assert module(features, task="query")["token_embeddings"] is padded
        assert len(pooling(tasks=["query"]).pool(pages, task="query")[0]) == 3
        assert pooling(1)({**features})["token_embeddings"] is padded

    def test_options_and_inputs_are_checked(self, pooling):
        import vtc

        for options in ({"factor": 0.5}, {"method": "visionzip"}, {"method": vtc.DPCKNN(keep=1.0)}, {"protect": -1}):
            with pytest.raises(OptionError):
                pooling(**options)
        with pytest.raises(OptionError, match="padding_side"):
            pooling().pool(torch.ones(1, 2, 3), padding_side="up")
        with pytest.raises(InputError, match="NaN"):
            pooling().pool_one(page(9) * torch.nan)

    def test_a_pipeline_is_saved_and_loaded(self, pooling, encoder, tmp_path):
        from sentence_transformers import MultiVectorEncoder

        model = encoder(pooling(2.5, method="tome", protect=1, normalize=True, tasks=["document", "query"]))
        model.save_pretrained(str(tmp_path))
        saved = json.loads((tmp_path / "modules.json").read_text())
        assert saved[-1]["type"] == "vtc.retrieval.sentence_transformers.TokenPooling"
        again = MultiVectorEncoder(str(tmp_path), device="cpu", trust_remote_code=True, local_files_only=True)
        assert again[-1].get_config_dict() == model[-1].get_config_dict()
        before, after = model.encode_document(self.documents), again.encode_document(self.documents)
        for a, b in zip(before, after, strict=True):
            assert (a == b).all()

    def test_encoding_pools(self, pooling, encoder):
        plain = encoder()
        dense = plain.encode_document(self.documents)
        wanted = pool(list(dense), 3, protect=1)
        module = pooling(3, protect=1)
        baked = encoder(module).encode_document(self.documents)
        asked = plain.encode_document(self.documents, token_pooling=module)
        for a, b, c in zip(wanted, baked, asked, strict=True):
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(a, c)
        assert [len(x) for x in baked] == [1 + max((len(x) - 1) // 3, 1) for x in dense]
        queries = encoder(module).encode_query(self.documents[:1])
        assert len(queries[0]) == len(plain.encode_query(self.documents[:1])[0])

    def test_training_goes_through_it(self, pooling):
        x = page(30).requires_grad_()
        features = pooling()({"token_embeddings": x[None], "attention_mask": torch.ones(1, 30)})
        features["token_embeddings"][..., 0].sum().backward()
        assert x.grad.abs().sum(1).all()


class TestColPaliEngine:
    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip("colpali_engine.compression.token_pooling")

    @pytest.fixture
    def pooler(self):
        from vtc.retrieval import TokenPooler

        return TokenPooler

    def test_a_list(self, pooler):
        pages = [page(n) for n in (31, 1, 2, 31, 24)]
        out = pooler().pool_embeddings(pages, return_dict=True, pool_factor=2, num_workers=2)
        for given, y, ours, clusters in zip(
            pages, out.pooled_embeddings, pool(pages, 2), out.cluster_id_to_indices, strict=True
        ):
            assert torch.equal(y, ours) and list(clusters) == list(range(len(y)))
            assert sorted(i for (at,) in clusters.values() for i in at.tolist()) == list(range(len(given)))
            means = torch.stack([given[at].mean(0) for at in clusters.values()])
            torch.testing.assert_close(y, torch.nn.functional.normalize(means, dim=-1))
        assert torch.equal(pooler(2).pool_embeddings(pages)[0], out.pooled_embeddings[0])

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded(self, pooler, side):
        pages = [page(n) for n in (31, 24, 9)]
        padded = torch.nn.utils.rnn.pad_sequence(pages, batch_first=True, padding_side=side)
        pooled = pooler().pool_embeddings(padded, padding=True, padding_side=side, pool_factor=3)
        for row, ours in zip(pooled, pool(pages), strict=True):
            real = row[-len(ours) :] if side == "left" else row[: len(ours)]
            assert torch.equal(real, ours) and row.any(-1).sum() == len(ours)

    def test_counts_are_theirs(self, pooler):
        from colpali_engine.compression.token_pooling import HierarchicalTokenPooler

        pages = [torch.nn.functional.normalize(torch.randn(n, 16), dim=-1) for n in (2, 9, 31)]
        for factor in (2, 3, 10):
            theirs = HierarchicalTokenPooler().pool_embeddings(pages, pool_factor=factor)
            ours = pooler().pool_embeddings(pages, pool_factor=factor)
            assert [y.shape for y in ours] == [y.shape for y in theirs]

    def test_what_a_selection_drops_is_in_no_cluster(self, pooler):
        x = page(30)
        out = pooler(method="divprune", normalize=False).pool_embeddings([x], return_dict=True)
        for row, (at,) in out.cluster_id_to_indices[0].items():
            assert torch.equal(x[at], out.pooled_embeddings[0][row : row + 1])

    def test_options_are_checked(self, pooler):
        with pytest.raises(OptionError, match="factor=0"):
            pooler(0)
        with pytest.raises(OptionError, match="choose one of"):
            pooler(method="kmeans")
