"""Sources of data as an option names them: one or several, with names or without."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blora_pyro.errors import UserError
from blora_pyro.languages import language_code

# A path or a name, or an object of `datasets`, which takes a second to import: options come before.
Source = str | Path | Any

FLEURS = "fleurs:"  # and languages, with commas between: the sets of google/fleurs
_FLEURS_CONFIGS = (
    "af_za am_et ar_eg as_in ast_es az_az be_by bg_bg bn_in bs_ba ca_es ceb_ph ckb_iq cmn_hans_cn "
    "cs_cz cy_gb da_dk de_de el_gr en_us es_419 et_ee fa_ir ff_sn fi_fi fil_ph fr_fr ga_ie gl_es "
    "gu_in ha_ng he_il hi_in hr_hr hu_hu hy_am id_id ig_ng is_is it_it ja_jp jv_id ka_ge kam_ke "
    "kea_cv kk_kz km_kh kn_in ko_kr ky_kg lb_lu lg_ug ln_cd lo_la lt_lt luo_ke lv_lv mi_nz mk_mk "
    "ml_in mn_mn mr_in ms_my mt_mt my_mm nb_no ne_np nl_nl nso_za ny_mw oc_fr om_et or_in pa_in "
    "pl_pl ps_af pt_br ro_ro ru_ru sd_in sk_sk sl_si sn_zw so_so sr_rs sv_se sw_ke ta_in te_in "
    "tg_tj th_th tr_tr uk_ua umb_ao ur_pk uz_uz vi_vn wo_sn xh_za yo_ng yue_hant_hk zu_za"
).split()
# Whisper's codes of those that begin otherwise
_FLEURS_CODES = {"zh": "cmn", "no": "nb", "jw": "jv", "tl": "fil"}

_NAMED = re.compile(r"([\w.-]+)=(.+)")


def is_table(source: object) -> bool:
    """Return whether a source is an object of `datasets`."""
    datasets = sys.modules.get("datasets")
    if datasets is None:  # so nobody can have made one
        return False
    names = ("Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict")
    return isinstance(source, tuple(getattr(datasets, name) for name in names))


def describe_source(source: Source) -> str:
    """Return a source as text; an object of `datasets` as "<Dataset of 3 rows, ...>"."""
    if not is_table(source):
        return str(source)
    table: Any = source
    kind = type(table).__name__
    if isinstance(table, dict):
        parts = ", ".join(f"{name}: {describe_source(one)}" for name, one in table.items())
        return f"<{kind} {parts}>"
    if kind == "Dataset":
        return f"<{kind} of {len(table)} rows, fingerprint {table._fingerprint}>"
    return f"<{kind}>"


def as_sources(value: Any) -> tuple[Source, ...]:
    """Return one source or several, or sources by name, as a tuple.

    Raises:
        UserError: If there is none.
    """
    if isinstance(value, Mapping) and not is_table(value):
        value = tuple(value.values())
    is_one = is_source(value)
    if not is_one and not (isinstance(value, list | tuple) and all(map(is_source, value))):
        raise UserError(f"data is {value!r}; give a source, or a list of them")
    sources = (value,) if is_one else tuple(value)
    if not sources:
        raise UserError("data names no source; give one or more")
    return sources


def is_source(value: object) -> bool:
    """Return whether a value can name a data set, or is one."""
    return isinstance(value, str | os.PathLike) or is_table(value)


def as_domains(value: Any) -> tuple[Source, ...] | dict[str, Source]:
    """Return sources by name if they have names, or a text among them is "NAME=SOURCE".

    Others are returned as a tuple.

    Raises:
        UserError: If there is none, or two have one name.
    """
    sources = as_sources(value)
    if isinstance(value, Mapping) and not is_table(value):
        return named_sources(value)
    texts = [source for source in sources if isinstance(source, str)]
    if len(texts) == len(sources) and any(map(_name_and_source, texts)):
        return named_sources(texts)
    return sources


def named_sources(value: Mapping[str, Source] | Sequence[str]) -> dict[str, Source]:
    """Return sources by name, of a mapping or of texts "NAME=SOURCE" or "SOURCE", its own name.

    A text that is an existing path is not taken apart.

    Raises:
        UserError: If two have one name.
    """
    if isinstance(value, Mapping) and not is_table(value):
        named = {name: one for name, one in value.items() if isinstance(name, str)}
        if not all(map(is_source, named.values())) or len(named) < len(value):
            raise UserError(f"sources are {value!r}; give each a name and a source")
        return named
    if not isinstance(value, list | tuple) or not all(map(is_source, value)):
        raise UserError("backward must be a list of sources, or sources by name")
    found: dict[str, Source] = {}
    for text in map(str, value):
        match = _name_and_source(text)
        name, source = match.groups() if match else (text, text)
        if name in found:
            raise UserError(f"two sets are called '{name}'; name them apart: NAME=SOURCE")
        found[name] = source
    return found


def fleurs_sets(text: str) -> list[str]:
    """Return the sets of "fleurs:de,fr": `de=google/fleurs:de_de` and `fr=google/fleurs:fr_fr`.

    A language is a code or name of Whisper's, or a configuration of google/fleurs.

    Raises:
        UserError: If it has no such language.
    """
    found = []
    for given in text.removeprefix(FLEURS).split(","):
        name = given.strip()
        if name in _FLEURS_CONFIGS:
            config = name
        else:
            code = language_code(name)
            start = _FLEURS_CODES.get(code, code)
            config = next((one for one in _FLEURS_CONFIGS if one.split("_")[0] == start), "")
            name = code
        if not config:
            raise UserError(
                f"backward is '{FLEURS}{name}', and google/fleurs has no such language; give "
                f"languages of it, such as {FLEURS}de,fr,zh"
            )
        found.append(f"{name}=google/fleurs:{config}")
    return found


def _name_and_source(text: str) -> re.Match[str] | None:
    """Return the match of "NAME=SOURCE"; None for an existing path, or a text without a name."""
    return None if os.path.exists(text) else _NAMED.fullmatch(text)
