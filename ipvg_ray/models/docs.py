"""The page `docs/models.md`, written from the registry: `python -m ipvg_ray.models.docs > docs/models.md`."""

from __future__ import annotations

from ipvg_ray.models.registry import MODELS, HubSource, Model, UrlSource

_TOP = """\
# Models

<!-- Written by `python -m ipvg_ray.models.docs > docs/models.md` from ipvg_ray/models/registry.py: change that. -->

ipvg_ray carries no weights. Profile `gpu` names the models below; each is looked for under its name below
`models.root` (`~/.cache/ipvg_ray/models` unless you set another); any of them can be replaced by a path of your own.

    ipvg-ray models pull --profile gpu       # shows sizes, licences and checksums first; resumes when cut
    ipvg-ray models check                    # says what the configuration names and cannot use
    ipvg-ray models make-mini DIR            # random miniatures of all of them, for profile cpu-mini

"""

_LICENCES = """
## Licences

The program is Apache-2.0; the weights are not part of it and keep their own terms. What decides is the strictest link
of the chain you run:

- **Marked "no" above: not for commercial use.** `models pull` refuses these until you add `--accept-licence`, which
  says that you have read the terms and may use them; it grants nothing. With the defaults of profile `gpu` three links
  carry such terms: the InsightFace packs, HyperLoRA's weights (CC BY-NC 4.0), and the HRNet checkpoint because of its
  training pictures. A run with them is for research and other non-commercial ends, and so, by the cautious reading that
  we recommend, are its videos and scores.
- **HRNet is optional.** `--set matting.method=landmarks` needs no further model. The InsightFace packs and HyperLoRA
  are part of the method; a commercial user needs other terms from their owners, or models of the same interface.
- **Metrics are optional.** Those whose models are marked "no" are left out until `evaluate.accept_licence` is set, as
  are those whose models are not there; every row and the report say so ([evaluate.md](evaluate.md)).
- **OpenRAIL++-M** (SDXL, RealVisXL) allows commercial use but forbids a list of uses, among them deceiving and harming
  people, and wants that list passed on to your users.
- **Consent.** No licence above gives a right to anybody's face. Use pictures of people who agreed.

## What a pull checks

Files of the Hub are taken from one commit and compared with the sizes, SHA-256 sums (large files) and git blob ids
(small ones) that the Hub announces for it; release archives with the sums listed at the end. Where nobody published a
sum, the one of what came is kept. A model appears at its place only when all of it is right, and `.receipts/` below
`models.root` then holds its commit or URL and the SHA-256 of every file, which `models check` compares.

The HRNet checkpoint and those of the metrics are pickles. They are read without running code from them: with
`weights_only=True`, or, where torch refuses a file for what else it holds, with everything but its tensors left alone.

"""


def markdown_table() -> str:
    """All models as a Markdown table: name, use, source, size, licence, whether commercial use is allowed."""
    rows = ["| model | used by | what for | source | size | licence | commercial use |", "|" + "---|" * 7]
    for model in MODELS:
        used = ", ".join(f"`{field}`" for field in model.used_by) or "by choice"
        terms = f"[{model.licence.spdx.removeprefix('LicenseRef-')}]({model.licence.url}): {model.licence.who}"
        allowed = "yes" if model.licence.commercial else "**no**"
        cells = (f"`{model.name}`", used, model.purpose, _source(model), _size(model), terms, allowed)
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def verification() -> str:
    """Per model: which of its facts were seen at their source, which were not, and its checksum where one is known."""
    lines = ["## What was verified", "", "When this table was written, without downloading the weights:", ""]
    for model in MODELS:
        text = f"- `{model.name}`: {model.verified}."
        if model.unverified:
            text += f" **Not verified:** {model.unverified}."
        if isinstance(model.source, UrlSource) and model.source.sha256:
            digits = model.source.sha256
            text += f" SHA-256 `{digits}{'' if len(digits) == 64 else '…'}`."
        lines.append(text)
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole of `docs/models.md`."""
    return _TOP + markdown_table() + _LICENCES + verification()


def _source(model: Model) -> str:
    source = model.source
    if isinstance(source, HubSource):
        part = f", `{source.subpath}`" if source.subpath else ""
        return f"[{source.repo}]({source.url}){part}"
    return f"[{source.url.rpartition('/')[2]}]({source.url})"


def _size(model: Model) -> str:
    if model.approx_bytes >= 1e9:
        return f"{model.approx_bytes / 1e9:.1f} GB"
    return f"{model.approx_bytes / 1e6:.0f} MB"


if __name__ == "__main__":
    print(page(), end="")
