"""The words that the Hub takes in a card's metadata; it refuses a card with others, after the weights were uploaded."""

import re
from collections.abc import Iterable

# "license", as the Hub's own message of autumn 2026 lists it.
_LISTED = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
"""
LICENCES = frozenset(_LISTED.split())
# "language": ISO 639-1, any code of three letters (ISO 639-2 and 639-3), and two words of the Hub's own.
_ISO_639_1 = """
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en
    eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka
    kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl
    nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si sk sl sm sn so sq sr ss st su sv
    sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
"""
_TWO_LETTERS = frozenset(_ISO_639_1.split())
_LANGUAGE_WORDS = ("code", "multilingual")
_LICENCE_FILE = re.compile(
    r"(un)?licen[sc]es?|copying|copyright|notice|use[_-]policy|acceptable[_-]use|eula", re.IGNORECASE
)


def licence_slug(name: str) -> str:
    """A licence's name as the Hub writes names: "Apache 2.0" is apache-2.0."""
    return re.sub(r"[^a-z0-9.+]+", "-", name.strip().lower()).strip("-")


def languages(names: Iterable[str]) -> list[str]:
    """Those of the names that are codes of languages, each once, in lower case; "English" and "zh-CN" are none."""
    codes = dict.fromkeys(name.strip().lower() for name in names)
    return [c for c in codes if c in _TWO_LETTERS or re.fullmatch("[a-z]{3}", c) or c in _LANGUAGE_WORDS]


def is_licence_file(name: str) -> bool:
    """Whether a file, by its name, holds a licence or what belongs to it: LICENSE, licence.txt, Copying, NOTICE, …"""
    return _LICENCE_FILE.match(name) is not None
