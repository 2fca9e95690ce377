"""The smallest handler: three lines of a user who loads a model, with the decorator above them."""
# mypy: allow-untyped-defs

from sentence_transformers import SentenceTransformer

from coldstart import coldstart


@coldstart("sentences", load=lambda: SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2"))
def handler(event, model):
    return model.encode(event["input"]["texts"]).tolist()


if __name__ == "__main__":
    coldstart.serve(handler)
