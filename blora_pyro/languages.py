"""What is called a language: the one spoken, the one written, the prompt's, its script, its region.

One definition of scripts that are written without spaces serves labels, measures, the joining of
segments and subtitles: `UNSPACED`.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from blora_pyro.errors import UserError

# ISO 15924's code and Unicode's name of every script without spaces between words.
UNSPACED_SCRIPTS = {
    "Hani": "Han",
    "Hira": "Hiragana",
    "Kana": "Katakana",
    "Thai": "Thai",
    "Laoo": "Lao",
    "Khmr": "Khmer",
    "Mymr": "Myanmar",
    "Tibt": "Tibetan",
    "Java": "Javanese",
    "Lana": "Tai_Tham",
    "Tale": "Tai_Le",
    "Talu": "New_Tai_Lue",
    "Tavt": "Tai_Viet",
}
# The inside of a character class for `regex`; the sound marks of kana belong to no script.
UNSPACED = "".join(rf"\p{{{name}}}" for name in UNSPACED_SCRIPTS.values()) + "ーｰ"
UNSPACED_LANGUAGES = {"zh", "yue", "ja", "th", "lo", "km", "my", "bo"}  # in their usual script

_MIXED_SCRIPTS = {"Hans", "Hant", "Jpan", "Hrkt"}  # ISO's names for parts and mixtures of them
_OTHER_SCRIPTS = {
    *("Arab", "Armn", "Beng", "Cyrl", "Deva", "Ethi", "Geor", "Grek", "Gujr", "Guru", "Hang"),
    *("Hebr", "Knda", "Kore", "Latn", "Mlym", "Mong", "Orya", "Sinh", "Taml", "Telu"),
}
_SCRIPTS = {*UNSPACED_SCRIPTS, *_MIXED_SCRIPTS, *_OTHER_SCRIPTS}

# Whisper's languages by their codes, in the order of its tokens, and further names of some: tables
# of openai/whisper that transformers has, too, whose import takes seconds.
_NAMES = (
    "en english, zh chinese, de german, es spanish, ru russian, ko korean, fr french, ja "
    "japanese, pt portuguese, tr turkish, pl polish, ca catalan, nl dutch, ar arabic, sv swedish, "
    "it italian, id indonesian, hi hindi, fi finnish, vi vietnamese, he hebrew, uk ukrainian, el "
    "greek, ms malay, cs czech, ro romanian, da danish, hu hungarian, ta tamil, no norwegian, th "
    "thai, ur urdu, hr croatian, bg bulgarian, lt lithuanian, la latin, mi maori, ml malayalam, "
    "cy welsh, sk slovak, te telugu, fa persian, lv latvian, bn bengali, sr serbian, az "
    "azerbaijani, sl slovenian, kn kannada, et estonian, mk macedonian, br breton, eu basque, is "
    "icelandic, hy armenian, ne nepali, mn mongolian, bs bosnian, kk kazakh, sq albanian, sw "
    "swahili, gl galician, mr marathi, pa punjabi, si sinhala, km khmer, sn shona, yo yoruba, so "
    "somali, af afrikaans, oc occitan, ka georgian, be belarusian, tg tajik, sd sindhi, gu "
    "gujarati, am amharic, yi yiddish, lo lao, uz uzbek, fo faroese, ht haitian creole, ps "
    "pashto, tk turkmen, nn nynorsk, mt maltese, sa sanskrit, lb luxembourgish, my myanmar, bo "
    "tibetan, tl tagalog, mg malagasy, as assamese, tt tatar, haw hawaiian, ln lingala, ha hausa, "
    "ba bashkir, jw javanese, su sundanese, yue cantonese"
)
_FURTHER_NAMES = (
    "my burmese, ca valencian, nl flemish, ht haitian, lb letzeburgesch, ps pushto, pa panjabi, "
    "ro moldavian, ro moldovan, si sinhalese, es castilian, zh mandarin"
)
LANGUAGES = dict(pair.split(" ", 1) for pair in _NAMES.split(", "))
_CODES = {name: code for code, name in LANGUAGES.items()}
_CODES |= {name: code for code, name in (pair.split(" ", 1) for pair in _FURTHER_NAMES.split(", "))}

# Codes that others use for a language of Whisper's, those of ISO 639-3 and 639-2 among them.
_OTHER_CODES = {"nb": "no", "jv": "jw", "iw": "he", "ji": "yi"}
_OTHER_CODES |= {"mandarin chinese": "zh", "cantonese chinese": "yue", "filipino": "tl"}  # FLEURS'
_ISO_639_3 = (
    "eng=en zho=zh chi=zh cmn=zh deu=de ger=de spa=es rus=ru kor=ko fra=fr fre=fr jpn=ja por=pt "
    "tur=tr pol=pl cat=ca nld=nl dut=nl ara=ar arb=ar swe=sv ita=it ind=id hin=hi fin=fi vie=vi "
    "heb=he ukr=uk ell=el gre=el msa=ms may=ms zsm=ms ces=cs cze=cs ron=ro rum=ro dan=da hun=hu "
    "tam=ta nor=no nob=no tha=th urd=ur hrv=hr bul=bg lit=lt lat=la mri=mi mao=mi mal=ml cym=cy "
    "wel=cy slk=sk slo=sk tel=te fas=fa per=fa pes=fa lav=lv lvs=lv ben=bn srp=sr aze=az azj=az "
    "slv=sl kan=kn est=et ekk=et mkd=mk mac=mk bre=br eus=eu baq=eu isl=is ice=is hye=hy arm=hy "
    "nep=ne npi=ne mon=mn khk=mn bos=bs kaz=kk sqi=sq alb=sq als=sq swa=sw swh=sw glg=gl mar=mr "
    "pan=pa sin=si khm=km sna=sn yor=yo som=so afr=af oci=oc kat=ka geo=ka bel=be tgk=tg snd=sd "
    "guj=gu amh=am yid=yi ydd=yi lao=lo uzb=uz uzn=uz fao=fo hat=ht pus=ps pbt=ps tuk=tk nno=nn "
    "mlt=mt san=sa ltz=lb mya=my bur=my bod=bo tib=bo tgl=tl fil=tl mlg=mg plt=mg asm=as tat=tt "
    "lin=ln hau=ha bak=ba jav=jw sun=su"
)
_OTHER_CODES |= dict(pair.split("=") for pair in _ISO_639_3.split())

_ISO_639_1 = frozenset(
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy "
    "da de dv dz ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu "
    "hy hz ia id ie ig ii ik io is it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb "
    "lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om "
    "or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw "
    "ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu".split()
)

_REGIONS = frozenset(  # ISO 3166-1, and UK
    "AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR "
    "BS BT BV BW BY BZ CA CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ "
    "EC EE EG EH ER ES ET FI FJ FK FM FO FR GA GB GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW "
    "GY HK HM HN HR HT HU ID IE IL IM IN IO IQ IR IS IT JE JM JO JP KE KG KH KI KM KN KP KR KW KY "
    "KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO MP MQ MR MS MT MU MV "
    "MW MX MY MZ NA NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN PR PS PT PW PY "
    "QA RE RO RS RU RW SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG "
    "TH TJ TK TL TM TN TO TR TT TV TW TZ UA UG UK UM US UY UZ VA VC VE VG VI VN VU WF WS YE YT ZA "
    "ZM ZW".split()
)
# Languages of the regions whose code is also that of a language: "fr-be" is French of Belgium, and
# "fr-es" French with Spanish.
_SPOKEN_IN = {
    "AF": "fa ps uz tk", "AM": "hy", "AR": "es", "BA": "bs hr sr", "BE": "nl fr de", "BN": "ms",
    "BO": "es qu ay", "BR": "pt", "CA": "en fr", "CY": "el tr", "ES": "es ca gl eu oc",
    "ET": "am so", "FI": "fi sv", "FO": "fo da", "FR": "fr br oc eu ca", "GL": "da", "HT": "ht fr",
    "ID": "id jw su ms", "IT": "it de", "KM": "ar fr", "LA": "lo", "LB": "ar fr", "MG": "mg fr",
    "MK": "mk sq", "ML": "fr", "MR": "ar fr", "MT": "mt en", "MY": "ms en zh ta", "NE": "fr ha",
    "NO": "no nn", "PA": "es", "PS": "ar", "RU": "ru tt ba", "SA": "ar", "SD": "ar", "SI": "sl",
    "SN": "fr", "SO": "so ar", "SR": "nl", "SV": "es", "TG": "fr", "TL": "pt", "UK": "en cy",
    "UZ": "uz ru",
}  # fmt: skip

_CANTONESE = ("zh", "yue")  # joined, an older tag of it
_NO_LANGUAGE = {"mis", "mul", "und", "zxx"}  # ISO 639's uncoded, several, undetermined and none

_JOINT = re.compile(r"([-_])")


@dataclass(frozen=True)
class Language:
    """A language in its roles, or two that are mixed; see `read_language`.

    Attributes:
        codes: Whisper's codes of what is spoken, matrix language first, or ISO's of what Whisper
            lacks: the tokens of the prompt, see `prompt_codes`.
        script: ISO 15924's code of the script in which the first is written; "" is the usual one.
        region: That of the first, for which Whisper has no token.
    """

    codes: tuple[str, ...] = ()
    script: str = ""
    region: str = ""

    @property
    def code(self) -> str:
        """The codes, joined: "de", or "de-en" for code-switched speech; "" is unknown."""
        return "-".join(self.codes)

    @property
    def tag(self) -> str:
        """The whole of it, as `read_language` reads it: "zh-Hant-TW", "ca-spanish"."""
        parts = [part for part in (*self.codes[:1], self.script, self.region) if part]
        for before, code in itertools.pairwise(self.codes):
            is_clear = before not in _SPOKEN_IN.get(code.upper(), "").split()
            is_clear &= (before, code) != _CANTONESE
            parts.append(code if is_clear else LANGUAGES[code])
        return "-".join(parts)

    @property
    def unspaced(self) -> tuple[bool, ...]:
        """Whether it is written without spaces between words, for every code."""
        known = [code in UNSPACED_LANGUAGES for code in self.codes]
        if known and self.script:
            known[0] = self.script in {*UNSPACED_SCRIPTS, *_MIXED_SCRIPTS}
        return tuple(known)

    def written(self, task: str) -> "Language":
        """The language of the transcript, which normaliser and measure go by."""
        return ENGLISH if task == "translate" else self


ENGLISH = Language(("en",))  # what Whisper translates into, and all that an English-only base knows


@functools.cache
def read_language(text: str) -> Language:
    """Read a language, or several joined, as people write them: "German", "de-AT", "zh_hant_tw".

    Code-switched speech is joined, matrix language first: "de-en", "German-English". What follows a
    language may also be its script ("zh-Hant") or region ("pt-BR", "pt_br", "es-419"). Where a
    region's code is a language's, too, capitals or an underscore make it a region. Names are those
    of transformers' table for Whisper; a code of ISO 639 that is not in it stands for itself ("qu",
    "quz-es"). Anything else stays as it is, since a tokenizer may know more.

    Raises:
        UserError: If what follows the hyphen may be a region or a language, as in "ca-es".
    """
    first, *rest = _JOINT.split(text)
    if (main := _code(first) or _iso_code(first)) is None:
        return Language(tuple(text.split("-")) if text else ())
    codes, script, region = [main], "", ""
    shouted = text.isupper()
    for joint, part in zip(rest[::2], rest[1::2], strict=True):
        code = _code(part)
        is_first = len(codes) == 1
        if part.title() in _SCRIPTS and code in (None, codes[-1]):
            script = part.title() if is_first else script
        elif (code or _iso_code(part)) == codes[-1] or _is_region(
            part, codes[-1], code, joint, shouted
        ):
            is_code = part.isdecimal() or part.upper() in _REGIONS
            region = part.upper() if is_first and is_code else region
        elif (code := code or _iso_code(part)) is None:
            return Language(tuple(text.split("-")))
        elif (codes[-1], part.lower()) == _CANTONESE:
            raise UserError(
                f"the language '{text}' may be Cantonese, or Chinese code-switched with it; give "
                "'yue', or 'zh-cantonese'"
            )
        else:
            codes.append(code)
    return Language(tuple(codes), script, region)


def _code(name: str) -> str | None:
    """Return Whisper's code of a name or code; None if it is none."""
    name = name.strip().lower()
    return name if name in LANGUAGES else _CODES.get(name) or _OTHER_CODES.get(name)


def _iso_code(name: str) -> str | None:
    """Return what may be a code of ISO 639, of two or three letters; None if it is none."""
    name = name.strip().lower()
    is_code = re.fullmatch("[a-z]{3}", name) and name not in _NO_LANGUAGE
    return name if name in _ISO_639_1 or is_code else None


def is_iso_code(code: str) -> bool:
    """Tell whether a text is a code of ISO 639-1, or may be one of ISO 639-3 by its form."""
    return _iso_code(code) == code


def prompt_codes(code: str, language_map: Mapping[str, str]) -> tuple[str, ...]:
    """Return the languages whose tokens prompt a language, or code-switched ones.

    Args:
        code: Of `Language`, such as "qu-es".
        language_map: What stands for a language, or for several joined, which comes first:
            {"qu": "mi"} has "qu-es" prompted as ("mi", "es"), {"qu-es": "mi"} as ("mi",). Two equal
            ones that follow each other are one.
    """
    mapped = language_map.get(code) or "-".join(
        language_map.get(part, part) for part in code.split("-")
    )
    return tuple(part for part, _ in itertools.groupby(mapped.split("-")))


def read_language_map(value: Mapping[str, str]) -> dict[str, str]:
    """Return what prompts which languages, both by their codes; see `prompt_codes`.

    Raises:
        UserError: If one stands for itself, or see `read_language`.
    """
    found = {language_code(str(name)): language_code(str(one)) for name, one in value.items()}
    for name, one in found.items():
        if not (name and one) or name == one:
            raise UserError(
                f"language_map is '{name}={one}'; give LANG=TOKEN, a language and another that "
                "the base has a token for, such as qu=mi"
            )
    return found


def _is_region(part: str, before: str, code: str | None, joint: str, shouted: bool) -> bool:
    """Tell a region from a language of this code; None is no language.

    Raises:
        UserError: If it may be either.
    """
    region = part.upper()
    if region not in _REGIONS:
        return bool(re.fullmatch(r"\d{3}", part))
    if code is None or (part.isupper() and not shouted):
        return True
    speakers = _SPOKEN_IN.get(region, "").split()
    if before not in speakers:
        return False
    if joint == "_" or (code not in speakers and before != "en"):
        return True
    raise UserError(
        f"the language '{before}-{part}' may be {before} of a region, or code-switched {before} "
        f"and {code}; give '{before}-{region}', or the second by its name"
    )


def language_code(text: str) -> str:
    """Return the code of a language, or the joined codes of two, see `read_language`."""
    return read_language(text).code


def is_language(text: str) -> bool:
    """Tell whether a text names one of Whisper's languages, or several joined."""
    try:
        codes = read_language(text).codes
    except UserError:
        return False
    return bool(codes) and all(code in LANGUAGES for code in codes)


def near_languages(text: str, known: Iterable[str]) -> str:
    """Return which of some codes may be meant by a text, in words: "such as ka (Georgian)"."""
    names = {name: code for code in known for name in (code, LANGUAGES.get(code, code))}
    near = get_close_matches(text.lower(), names, cutoff=0.5) or ["en", "de", "zh"]
    found = dict.fromkeys(names.get(name, name) for name in near)
    return "such as " + ", ".join(f"{code} ({LANGUAGES.get(code, code).title()})" for code in found)


def _first(pattern: str, text: str) -> str | None:
    import regex  # only where there are texts: a refused option need not wait for it

    found = regex.search(pattern, text)
    return None if found is None else found[0]


def is_unspaced(text: str) -> bool:
    """Whether a text has a character of a script that is written without spaces between words."""
    return _first(f"[{UNSPACED}]", text) is not None


def begins_unspaced(text: str) -> bool:
    """Whether the first letter of a text is of such a script; digits and signs are of any."""
    return _first_is_unspaced(text) is True


def _first_is_unspaced(text: str) -> bool | None:
    """Tell it of the first letter; None if there is none."""
    found = _first(r"\p{L}", text)
    return None if found is None else is_unspaced(found)


def join_texts(texts: Iterable[str]) -> str:
    """Join pieces of a transcript by spaces, but not where both sides are written without."""
    joined = ""
    for text in texts:
        sides = {_first_is_unspaced(joined[::-1]), _first_is_unspaced(text)}
        spaced = joined and (False in sides or True not in sides)
        joined += f" {text}" if spaced else text
    return joined
