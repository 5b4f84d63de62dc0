"""Articles that quote a claim in order to check it: stock phrases of our own around real sentences.

Made for the reranking of Sheng et al. 2021 (MTM), whose own texts cannot be had offline. Semi-synthetic: the
sentences are real, the claims are damaged copies of some, and what introduces or debunks them are templates.
"""

import re
from typing import NamedTuple

TEMPLATES = (
    "a post shared thousands of times claims that {}",
    "it has been said again and again that {}",
    "did you hear that {} ? we looked into it",
    "a message that goes around says {}",
    "the claim that {} is false",
    "there is no evidence that {}",
    "contrary to what is being told , it is not true that {}",
    "fact check : {} is a rumour",
)


class QuoteCorpus(NamedTuple):
    """claims: words of each; articles: sentences of each, article i about claim i; quote: where it quotes."""

    claims: list
    articles: list
    quote: list


def split_sentences(text, *, shortest=6):
    """Lists of lower-case words and marks, one a sentence, of those with at least `shortest` words."""
    words = [re.findall(r"[a-z']+|[.,;:!?]", s.lower()) for s in re.split(r"(?<=[.!?])\s+", text)]
    return [w for w in words if sum(x[0].isalpha() for x in w) >= shortest]


def quote_corpus(rng, sentences, *, claims, extra=5, drop=(0.2, 0.4)) -> QuoteCorpus:
    """For each of `claims` sentences: a copy that lost words, and an article that quotes the whole.

    An article is a template around the sentence, put among `extra` other sentences. drop: the least and the
    largest share of words that the claim lost.
    Raises: ValueError if there are too few sentences.
    """
    if claims < 1 or len(sentences) < claims * (extra + 1):
        raise ValueError(f"{claims} articles of {extra + 1} sentences asked, but there are {len(sentences)}")
    order = rng.permutation(len(sentences))
    out = QuoteCorpus([], [], [])
    for n in range(claims):
        own, *others = (sentences[i] for i in order[n * (extra + 1) : (n + 1) * (extra + 1)])
        kept = rng.random(len(own)) >= rng.uniform(*drop)
        template = TEMPLATES[rng.integers(len(TEMPLATES))].format(" ".join(own)).split()
        place = int(rng.integers(extra + 1))
        out.claims.append([w for w, k in zip(own, kept, strict=True) if k] or own[:1])
        out.articles.append([*others[:place], template, *others[place:]])
        out.quote.append(place)
    return out
