"""Short Portuguese sentences that agree in gender and number, with their English translations.

    >>> sentence(random.Random(4))  # doctest: +SKIP
    ('as meninas não compraram estas flores amarelas', 'the girls did not buy these yellow flowers')

Articles, demonstratives, possessives and adjectives agree with their noun, verbs with their
subject, and prepositions contract with the word that follows ("em" + "a" is "na"). One English
sentence may have several Portuguese sentences ("é", "está"), never the other way round.
"""

from __future__ import annotations

import random
from typing import NamedTuple


class Noun(NamedTuple):
    """Both numbers in both languages; `f` says whether it is feminine."""

    one: str
    many: str
    f: bool
    en_one: str
    en_many: str


class Phrase(NamedTuple):
    """A noun phrase in both languages; `det` is apart, because prepositions contract with it."""

    det: str
    rest: str
    en: str
    plural: bool
    f: bool

    @property
    def pt(self) -> str:
        return f"{self.det} {self.rest}"


def _nouns(text: str) -> tuple[Noun, ...]:
    rows = (line.split() for line in text.strip().splitlines())
    return tuple(Noun(one, many, g == "f", en, ens) for one, many, g, en, ens in rows)


PEOPLE = _nouns("""
    menino meninos m boy boys
    menina meninas f girl girls
    homem homens m man men
    mulher mulheres f woman women
    professor professores m teacher teachers
    professora professoras f teacher teachers
    médico médicos m doctor doctors
    médica médicas f doctor doctors
    amigo amigos m friend friends
    amiga amigas f friend friends
    irmão irmãos m brother brothers
    irmã irmãs f sister sisters
    criança crianças f child children
    vizinho vizinhos m neighbor neighbors
    vizinha vizinhas f neighbor neighbors
    rei reis m king kings
    rainha rainhas f queen queens
""")
ANIMALS = _nouns("""
    gato gatos m cat cats
    cachorro cachorros m dog dogs
    cavalo cavalos m horse horses
    pássaro pássaros m bird birds
    vaca vacas f cow cows
    galinha galinhas f hen hens
    rato ratos m mouse mice
    leão leões m lion lions
""")
THINGS = _nouns("""
    casa casas f house houses
    carro carros m car cars
    livro livros m book books
    mesa mesas f table tables
    cadeira cadeiras f chair chairs
    flor flores f flower flowers
    jornal jornais m newspaper newspapers
    chave chaves f key keys
    janela janelas f window windows
    porta portas f door doors
    maçã maçãs f apple apples
    bolo bolos m cake cakes
    sapato sapatos m shoe shoes
    camisa camisas f shirt shirts
    caneta canetas f pen pens
    avião aviões m plane planes
    limão limões m lemon lemons
    chapéu chapéus m hat hats
    computador computadores m computer computers
    barco barcos m boat boats
""")
PLACES = _nouns("""
    jardim jardins m garden gardens
    cozinha cozinhas f kitchen kitchens
    cidade cidades f city cities
    parque parques m park parks
    floresta florestas f forest forests
    escola escolas f school schools
    hospital hospitais m hospital hospitals
    mercado mercados m market markets
    biblioteca bibliotecas f library libraries
    quarto quartos m room rooms
""")

# Masculine and feminine singular, then the plurals, then English.
Adjective = tuple[str, str, str, str, str]


def _adjectives(text: str) -> tuple[Adjective, ...]:
    """Regular ones by their ending: -o has four forms, -e and -l two; others are written out."""
    out: list[Adjective] = []
    for line in text.strip().splitlines():
        *forms, en = line.split()
        if len(forms) == 2:
            one, many = forms
            out.append((one, one, many, many, en))
        else:
            stem = forms[0][:-1]
            out.append((stem + "o", stem + "a", stem + "os", stem + "as", en))
    return tuple(out)


# Used of people and animals, with "ser".
LIVING = _adjectives("""
    alto tall
    velho old
    bonito beautiful
    jovem jovens young
    forte fortes strong
    pequeno small
    magro thin
    simpático friendly
    inteligente inteligentes clever
""")
# Used of things, with "ser".
INERT = _adjectives("""
    grande grandes big
    pequeno small
    novo new
    velho old
    branco white
    preto black
    vermelho red
    amarelo yellow
    verde verdes green
    azul azuis blue
    caro expensive
    barato cheap
    bonito beautiful
    leve leves light
    pesado heavy
""")
# Passing states, said with "estar".
LIVING_STATES = _adjectives("""
    cansado tired
    doente doentes sick
    feliz felizes happy
    triste tristes sad
    ocupado busy
""")
INERT_STATES = _adjectives("""
    limpo clean
    sujo dirty
    molhado wet
    quebrado broken
""")


class Verb(NamedTuple):
    """Third persons: present and past, singular and plural; English base, -s form and past."""

    now_one: str
    now_many: str
    past_one: str
    past_many: str
    base: str
    base_s: str
    past: str


def _verbs(text: str) -> tuple[Verb, ...]:
    rows = (line.split() for line in text.strip().splitlines())
    return tuple(Verb(*(word.replace("_", " ") for word in row)) for row in rows)


BUY = _verbs("""
    compra compram comprou compraram buy buys bought
    vende vendem vendeu venderam sell sells sold
    vê veem viu viram see sees saw
    tem têm teve tiveram have has had
    quer querem quis quiseram want wants wanted
    procura procuram procurou procuraram look_for looks_for looked_for
    perde perdem perdeu perderam lose loses lost
    encontra encontram encontrou encontraram find finds found
    pinta pintam pintou pintaram paint paints painted
    limpa limpam limpou limparam clean cleans cleaned
""")
KNOW = _verbs("""
    conhece conhecem conheceu conheceram know knows knew
    ajuda ajudam ajudou ajudaram help helps helped
    ama amam amou amaram love loves loved
    visita visitam visitou visitaram visit visits visited
    vê veem viu viram see sees saw
    segue seguem seguiu seguiram follow follows followed
""")
LIKE = _verbs("""
    gosta gostam gostou gostaram like likes liked
    precisa precisam precisou precisaram need needs needed
""")
STAY = _verbs("""
    dorme dormem dormiu dormiram sleep sleeps slept
    trabalha trabalham trabalhou trabalharam work works worked
    brinca brincam brincou brincaram play plays played
    corre correm correu correram run runs ran
    canta cantam cantou cantaram sing sings sang
    vive vivem viveu viveram live lives lived
    espera esperam esperou esperaram wait waits waited
    chora choram chorou choraram cry cries cried
""")

# Determiners by (feminine, plural): m one, f one, m many, f many; English one, many.
THE = ("o", "a", "os", "as", "the", "the")
A = ("um", "uma", "uns", "umas", "a", "some")
THIS = ("este", "esta", "estes", "estas", "this", "these")
THAT = ("aquele", "aquela", "aqueles", "aquelas", "that", "those")
MY = ("meu", "minha", "meus", "minhas", "my", "my")
OUR = ("nosso", "nossa", "nossos", "nossas", "our", "our")
DEFINITE = (THE, THIS, THAT, MY, OUR)
ANY = (THE, THE, A, THIS, THAT, MY, OUR)

# Small numbers whose words show gender (1 and 2 at the end) as often as not.
COUNTS = {2: ("dois", "duas", "two"), 3: ("três",) * 2 + ("three",), 4: ("quatro",) * 2 + ("four",)}
COUNTS |= {5: ("cinco",) * 2 + ("five",), 12: ("doze",) * 2 + ("twelve",)}
COUNTS |= {21: ("vinte e um", "vinte e uma", "twenty-one")}
COUNTS |= {32: ("trinta e dois", "trinta e duas", "thirty-two")}
COUNTS |= {200: ("duzentos", "duzentas", "two hundred")}


def contract(preposition: str, det: str) -> str:
    """ "em" and "de" with the word that follows: "na", "neste", "do", "daquela", "num"."""
    if det in THE[:4]:
        return {"em": "n", "de": "d"}[preposition] + det
    if det in THIS[:4] + THAT[:4] or (preposition == "em" and det in A[:4]):
        return {"em": "n", "de": "d"}[preposition] + det
    return f"{preposition} {det}"


def article(words: str) -> str:
    """ "a" or "an" before English words; no word here has a silent h or a "yoo" sound."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def noun_phrase(
    rng: random.Random,
    nouns: tuple[Noun, ...],
    adjectives: tuple[Adjective, ...] = (),
    determiners: tuple[tuple[str, ...], ...] = ANY,
    plural: bool | None = None,
) -> Phrase:
    """A determiner or count, a noun and perhaps an adjective, all agreeing."""
    noun = rng.choice(nouns)
    plural = rng.random() < 0.5 if plural is None else plural
    form = 2 * plural + noun.f
    pt, en = (noun.many, noun.en_many) if plural else (noun.one, noun.en_one)
    if adjectives and rng.random() < 0.5:
        adjective = rng.choice(adjectives)
        pt, en = f"{pt} {adjective[form]}", f"{adjective[4]} {en}"
    if plural and determiners is ANY and rng.random() < 0.2:
        masculine, feminine, count = COUNTS[rng.choice(list(COUNTS))]
        return Phrase(feminine if noun.f else masculine, pt, f"{count} {en}", plural, noun.f)
    det = rng.choice(determiners)
    en = article(en) if det is A and not plural else f"{det[4 + plural]} {en}"
    return Phrase(det[form], pt, en, plural, noun.f)


def predicate(rng: random.Random, verb: Verb, plural: bool) -> tuple[str, str]:
    """A verb form in both languages: present or past, plain or denied."""
    past, denied = rng.random() < 0.4, rng.random() < 0.25
    pt = verb[2 * past + plural]
    if denied:
        auxiliary = "did" if past else "do" if plural else "does"
        return f"não {pt}", f"{auxiliary} not {verb.base}"
    return pt, verb.past if past else verb.base if plural else verb.base_s


def _copula(rng: random.Random) -> tuple[str, str]:
    """ "a casa velha é grande", "estas meninas não estão cansadas"."""
    living = rng.random() < 0.5
    traits = LIVING if living else INERT
    subject = noun_phrase(rng, PEOPLE + ANIMALS if living else THINGS, traits)
    state = rng.random() < 0.4
    choices = traits if not state else LIVING_STATES if living else INERT_STATES
    # An adjective said twice of one noun ("the old house is old") is no sentence.
    adjective = rng.choice([a for a in choices if f" {a[4]} " not in f" {subject.en} "])
    be = (("é", "são"), ("está", "estão"))[state][subject.plural]
    no, en_no = ("não ", " not") if rng.random() < 0.2 else ("", "")
    en_be = "are" if subject.plural else "is"
    form = 2 * subject.plural + subject.f
    return f"{subject.pt} {no}{be} {adjective[form]}", f"{subject.en} {en_be}{en_no} {adjective[4]}"


def _transitive(rng: random.Random) -> tuple[str, str]:
    """ "os meninos compram aquela camisa azul"."""
    subject = noun_phrase(rng, PEOPLE, LIVING if rng.random() < 0.3 else ())
    if rng.random() < 0.6:
        verb, thing = rng.choice(BUY), noun_phrase(rng, THINGS, INERT)
    else:
        verb, thing = rng.choice(KNOW), noun_phrase(rng, PEOPLE + ANIMALS, LIVING)
    pt, en = predicate(rng, verb, subject.plural)
    return f"{subject.pt} {pt} {thing.pt}", f"{subject.en} {en} {thing.en}"


def _with_de(rng: random.Random) -> tuple[str, str]:
    """ "a médica gosta dos gatos brancos": "gostar" and "precisar" take "de"."""
    subject = noun_phrase(rng, PEOPLE)
    verb, thing = rng.choice(LIKE), noun_phrase(rng, THINGS, INERT)
    pt, en = predicate(rng, verb, subject.plural)
    return (
        f"{subject.pt} {pt} {contract('de', thing.det)} {thing.rest}",
        f"{subject.en} {en} {thing.en}",
    )


def _somewhere(rng: random.Random) -> tuple[str, str]:
    """ "as crianças brincam no parque"."""
    subject = noun_phrase(rng, PEOPLE + ANIMALS, LIVING)
    place = noun_phrase(rng, PLACES, INERT[:2] if rng.random() < 0.3 else (), plural=False)
    pt, en = predicate(rng, rng.choice(STAY), subject.plural)
    return (
        f"{subject.pt} {pt} {contract('em', place.det)} {place.rest}",
        f"{subject.en} {en} in {place.en}",
    )


def _owned(rng: random.Random) -> tuple[str, str]:
    """ "os livros velhos da menina são caros": "the girl's old books are expensive"."""
    owner = noun_phrase(rng, PEOPLE, determiners=DEFINITE)
    thing = noun_phrase(rng, THINGS, INERT, determiners=(THE,))
    adjective = rng.choice([a for a in INERT if f" {a[4]} " not in f" {thing.en} "])
    owner_en = owner.en + ("'" if owner.plural and owner.en.endswith("s") else "'s")
    be, en_be = ("são", "are") if thing.plural else ("é", "is")
    form = 2 * thing.plural + thing.f
    return (
        f"{thing.pt} {contract('de', owner.det)} {owner.rest} {be} {adjective[form]}",
        f"{owner_en} {thing.en.removeprefix('the ')} {en_be} {adjective[4]}",
    )


KINDS = (_copula, _transitive, _with_de, _somewhere, _owned)


def sentence(rng: random.Random) -> tuple[str, str]:
    """One Portuguese sentence and its English."""
    return rng.choice(KINDS)(rng)
