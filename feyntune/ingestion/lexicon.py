"""The words and phrase habits of the synthetic corpus (`synthetic.py`), one domain each.

Slots in templates: <n> <ns> noun, plural; <np> noun phrase; <a> adjective; <v> <vs> <ved> <ving> verb and its
forms; <adv> adverb; <who> the name of somebody or of a result; <place> a place; <f> a formula; <g> a Greek
letter in TeX; <x> <X> a letter; <d> a digit; <int> <num> a number.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from random import Random
from typing import Any


@dataclass
class Zipf:
    """Words in the order of falling frequency, for `random.choices`."""

    words: list[str]
    cumulated: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.cumulated = list(accumulate(1 / (rank + 12) for rank in range(len(self.words))))


class Domain:
    """One domain's lexicon. Compounds (prefix, stem, ending) make its vocabulary as open as a real one."""

    def __init__(
        self,
        name: str,
        *,
        nouns: str,
        adjectives: str,
        verbs: str,
        adverbs: str,
        prefixes: str,
        stems: str,
        endings: str,
        openings: str,
        habits: str,
        titles: str,
        shared: str,
        leads: str,
        tails: str,
        closings: str = "",
        formulas: str = "",
        categories: dict[str, int] | None = None,
        cross_lists: str = "",
        journals: tuple[str, ...] = (),
        since: int = 1991,
        until: int = 2025,
    ):
        self.name = name
        self.nouns = Zipf(nouns.split())
        self.adjectives = Zipf(adjectives.split())
        self.verbs = Zipf(verbs.split())
        self.adverbs = Zipf(adverbs.split())
        self.compounds = Zipf(_compounds(name, prefixes.split(), stems.split(), endings.split()))
        self.openings, self.habits, self.closings = _lines(openings), _lines(habits), _lines(closings)
        self.leads, self.tails = _lines(leads), _lines(tails)
        self.titles, self.formulas, self.shared = _lines(titles), _lines(formulas), _lines(shared)
        self.categories = list(categories or {name: 1})
        self.category_weights = list(accumulate((categories or {name: 1}).values()))
        self.cross_lists = cross_lists.split()
        self.journals = journals
        self.since, self.until = since, until  # years


def _compounds(name: str, prefixes: list[str], stems: list[str], endings: list[str]) -> list[str]:
    rng = Random(f"compounds {name}")
    made = {rng.choice(prefixes) + rng.choice(stems) + rng.choice(endings): None for _ in range(3000)}
    return list(made)


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines() if line.strip())


# What may stand before and after any sentence of an abstract.
SCIENCE_LEADS = """
    Moreover,
    In addition,
    Furthermore,
    More precisely,
    Remarkably,
    In this case
    Using <np>, we find that
    For <f>,
    As a consequence,
    In the presence of <a> <ns>,
    Unlike <np>,
    Following <who> and <who>,
    Motivated by recent work of <who>,
    When <np> is <adv> <ved>,
    At <x> = <num>,
    If <np> <vs> <np>,
"""
SCIENCE_TAILS = """
    up to <a> <ns>
    for <a> <ns>
    where <f> denotes the <n>
    with <f> and <f>
    as a function of <f>
    in the presence of <np>
    even when <np> is <a>
    provided that <np> <vs> <np>
    (see also <who> <int>)
    in terms of <a> <ns>
    by means of the <who> <n>
    which is <a> and <a>
    except for <np>
    and <np> is <ved>
"""

# What every abstract may say.
SCIENCE = """
    We show that <np> <vs> <np>.
    In this paper we <v> <np> and <v> <np>.
    Our results agree with those of <who> and <who>.
    The method is <adv> applied to <int> examples.
    As an application, we <v> <np> for <a> <ns>.
    This extends earlier work of <who> on <a> <ns>.
    We also comment on the role of <np>.
    However, <np> <adv> <vs> <np>, in contrast to what was believed.
    A key ingredient is <np>, which <vs> <np>.
    It turns out that <np> can be <adv> <ved> by <ving> <np>.
    For <int> of the <int> cases studied, <np> is <a>.
    We find that <np> is <adv> <a> when <np> is <a>.
    Finally, we discuss how <np> may be <ved>.
    The question whether <np> <vs> <np> remains open.
    By <ving> <np>, one <vs> <a> <ns>.
    Both <a> and <a> <ns> are considered.
"""

HEP_TH = Domain(
    "hep-th",
    nouns="""
        brane string theory symmetry duality amplitude anomaly operator correlator partition-function algebra
        supergravity gauge-group moduli-space compactification flux instanton spectrum holonomy orbifold
        vacuum potential coupling background boundary bulk horizon entropy conformal-block central-charge
        worldsheet superpotential multiplet supercharge soliton monopole dilaton gravitino tachyon torus
        fibration cohomology defect surface-operator Wilson-line charge quiver matrix-model integrability
        cocycle representation prepotential tensor-field deformation S-matrix twistor bootstrap lattice knot
        superspace cone throat
    """,
    adjectives="""
        supersymmetric conformal holographic non-perturbative topological chiral heterotic extremal
        noncommutative higher-spin Lorentzian Euclidean maximally-symmetric massless BPS anti-de-Sitter planar
        integrable dyonic modular abelian twisted five-dimensional ten-dimensional warped elliptic toric
        near-horizon off-shell dual gauge-invariant asymptotic renormalizable exceptional fractional Kähler
    """,
    verbs="""
        compactify quantize embed deform preserve break gauge wrap uplift dualize localize factorize
        regularize compute derive conjecture reproduce generalize classify
    """,
    adverbs="""
        holographically perturbatively exactly manifestly explicitly covariantly classically consistently
        non-trivially semiclassically
    """,
    prefixes="super hyper holo pseudo multi quasi anti bi poly meta para orbi twisto",
    stems="""
        brane string gauge flux spin loop graph vertex curv torsion symplect cohomo instant quiver dual modul
    """,
    endings=" ion on ino ology ification ism oid et ality ity",
    openings="""
        We study <a> <ns> in type <X> string theory compactified on <f>.
        We compute the <n> of <d>-dimensional <a> gauge theory with gauge group $SU(<d>)$.
        We construct <a> solutions of <d>-dimensional supergravity with <a> <ns>.
        It is shown that the <n> of <d>d $\\mathcal{N}=<d>$ theories is <ved> by the <a> <n>.
        We revisit the AdS/CFT correspondence for <a> <ns> at finite <g>.
        The <who> <n> is derived from the <a> worldsheet.
        We propose a holographic dual of the <a> <n> with <f>.
    """,
    habits="""
        In the large $N$ limit the <n> is governed by <f>.
        The dual description involves D<d>-branes wrapping a <a> <n>.
        The moduli space of vacua is parametrized by <f>.
        On the gravity side, the <n> arises from <a> <ns> in the bulk.
        The one-loop determinant gives <f>, in agreement with the <who> conjecture.
        Supersymmetry is broken to $\\mathcal{N}=<d>$ by <a> <ns>.
        We check this proposal by matching the <n> and the central charge.
        Anomaly cancellation requires <f>.
        These solutions interpolate between $AdS_<d>\\times S^<d>$ and a <a> <n>.
        Upon dimensional reduction, the <n> descends to a <a> <n> in <d> dimensions.
        The spectrum contains a tower of <a> <ns> with mass <f>.
        Using supersymmetric localization we <v> the <n> on $S^<d>$.
        The beta function vanishes and the theory flows to a <a> fixed point.
        Modular invariance fixes <f> up to <a> <ns>.
        The entropy of the extremal black hole matches the microscopic counting of <a> <ns>.
    """,
    closings="""
        Implications for the swampland and for M-theory are briefly discussed.
        We comment on possible generalizations to $\\mathcal{N}=<d>$ theories.
        This provides a non-trivial check of the duality beyond the planar limit.
        We conclude with speculations about the <a> <n> in F-theory.
    """,
    formulas="""
        $<X>_{<g><g>}$
        $AdS_<d>\\times S^<d>$
        $\\mathcal{N}=<d>$
        $\\int d^<d><x>\\, \\sqrt{-g}\\, <X>^2$
        $\\text{tr}\\, <X>^{<d>}$
        $SO(<d>,<d>)$
        $E_{<d>}\\times E_{<d>}$
        $\\langle \\mathcal{<X>}\\mathcal{<X>}\\rangle$
        $\\mathbb{CP}^<d>$
        $T\\bar{T}$
        $g_{\\rm YM}^2 N \\to <g>$
        $\\partial_<g> <X>^{<g>} = 0$
        $\\mathbb{Z}_<d>$
        $e^{2\\pi i <g>}$
    """,
    titles="""
        <a> <ns> in string theory
        On the <a> <n> of <a> <ns>
        Holography and the <who> <n>
        D-branes, <ns> and the <a> <n>
        A <a> <n> from M-theory
        <who> <ns> and $AdS_<d>$ vacua
    """,
    cross_lists="hep-ph gr-qc math-ph math.AG cond-mat.str-el quant-ph math.QA hep-lat",
    journals=("JSYNTH", "Synth.Phys.Lett.B", "Nucl.Imag.Phys.B"),
    shared=SCIENCE,
    leads=SCIENCE_LEADS,
    tails=SCIENCE_TAILS,
)

HEP_PH = Domain(
    "hep-ph",
    nouns="""
        neutrino quark lepton Higgs-boson cross-section branching-ratio decay collider coupling mixing-angle
        parton jet hadron meson baryon dark-matter gluon flavor luminosity rapidity background detector
        asymmetry mass-hierarchy leptogenesis form-factor renormalization fragmentation charmonium axion
        photon sfermion squark slepton neutralino chargino scattering channel threshold resonance width
        energy-scale oscillation tau-lepton sea-saw parameter-space exclusion-limit signal sphaleron
        condensate
    """,
    adjectives="""
        next-to-leading-order inclusive exclusive leptonic hadronic CP-violating electroweak flavor-changing
        supersymmetric inelastic transverse heavy light sterile charged neutral resonant perturbative soft
        collinear top-philic left-handed right-handed semileptonic rare atmospheric radiative nonrelativistic
        phenomenological experimental minimal vectorlike standard-model
    """,
    verbs="""
        constrain measure predict suppress enhance fit exclude evolve resum extract radiate decay scatter
        normalize simulate calculate estimate compare
    """,
    adverbs="""
        phenomenologically strongly significantly experimentally numerically kinematically resonantly
        dominantly slightly perturbatively
    """,
    prefixes="lepto hadro neutra photo chromo techni gluo axi electro flavo squa mesa top",
    stems="quark phil phob genesis decay jet fermi bos parton flavor mass mix scatter",
    endings=" onium ino on ation ity ness ing er ic-mode",
    openings="""
        We calculate the next-to-leading order QCD corrections to <n> production with $\\sqrt{s}=<int>$ TeV.
        We analyze the <a> decays $<X>\\to <X> \\ell^+\\ell^-$ in the standard model and beyond.
        The impact of <a> <ns> on the <n> is studied in the minimal supersymmetric standard model.
        We present a global fit of <a> parameters to the data of the <who> experiment.
        Recent measurements by the <who> collaboration constrain the <a> <n>.
        A model of <a> neutrino masses with <f> symmetry is presented.
    """,
    habits="""
        We find $<g>_<d> < <num> \\times 10^{-<d>}$ at 95\\% C.L.
        The branching ratio is predicted to be $(<num> \\pm <num>)\\times 10^{-<d>}$.
        The mass of the <n> must exceed <int> GeV.
        At a luminosity of <int> fb$^{-1}$ the signal can be observed with a significance of <num> $\\sigma$.
        The scale uncertainty is reduced from <int>\\% to <d>\\%.
        We use parton distributions evolved to $Q^2=<int>$ GeV$^2$.
        The dark matter relic density is obtained for masses between <int> GeV and <int> TeV.
        The results are compared with data from HERA, Tevatron and the <who> detector.
        Large logarithms of <f> are resummed to all orders.
        The form factors at zero recoil are taken from lattice QCD and QCD sum rules.
        Bounds on <f> follow from the nonobservation of <ns>.
        Cuts on the transverse momentum of the <n> suppress the <a> background.
        The CP asymmetry in <n> decays can be as large as <int>\\%.
    """,
    closings="""
        Prospects for the high-luminosity LHC and for a future linear collider are discussed.
        These predictions can be tested at Belle II and at the <who> facility.
        We give updated exclusion limits for the <a> <n>.
    """,
    formulas="""
        $\\alpha_s(M_Z)$
        $\\sin^2\\theta_{<d><d>}$
        $B\\to <X>^* \\gamma$
        $m_{\\tilde{<x>}}$
        $\\Delta m^2_{<d><d>}$
        $e^+e^-\\to <x>\\bar{<x>}$
        $|V_{<x><x>}|$
        $\\tan\\beta$
        $p_T$
        $\\mu\\to e\\gamma$
        $\\mathcal{O}(\\alpha_s^<d>)$
        $U(1)_{<X>-<X>}$
        $\\bar{<x>}<g>^{\\mu}<x>$
    """,
    titles="""
        <a> <n> production at hadron colliders
        Constraints on <a> <ns> from <n> decays
        Neutrino masses and <a> <ns>
        QCD corrections to the <a> <n>
        <a> dark matter and the <n>
    """,
    cross_lists="hep-ex hep-th astro-ph.CO nucl-th hep-lat astro-ph.HE",
    journals=("Synth.Rev.D", "Eur.Imag.J.C", "JSYNTH"),
    shared=SCIENCE,
    leads=SCIENCE_LEADS,
    tails=SCIENCE_TAILS,
)

GR_QC = Domain(
    "gr-qc",
    nouns="""
        black-hole spacetime metric geodesic horizon singularity curvature cosmology gravitational-wave
        perturbation binary waveform ringdown quasinormal-mode scalar-field inflation expansion observer
        geometry energy-condition foliation constraint tetrad connection wormhole accretion ergosphere
        redshift lensing loop-quantum-gravity spin-foam bounce collapse star boundary-term stress-energy
        torsion diffeomorphism initial-data gauge slicing merger template detector-noise chirp shadow
        photon-ring congruence hypersurface
    """,
    adjectives="""
        rotating spherically-symmetric asymptotically-flat charged anisotropic homogeneous isotropic null
        timelike spacelike Kerr-like static stationary axisymmetric post-Newtonian relativistic gravitational
        cosmological regular naked trapped vacuum primordial covariant teleparallel nonlinear compact massive
        hyperbolic self-dual tidal inspiralling
    """,
    verbs="""
        foliate perturb collapse accrete lens redshift evolve match truncate inspiral radiate merge solve
        integrate linearize violate admit describe
    """,
    adverbs="""
        gravitationally asymptotically numerically geometrically adiabatically globally locally analytically
        secularly dynamically
    """,
    prefixes="geo cosmo gravi chrono quasi horo iso co para peri astro mero",
    stems="metric geodes horizon curv tempor wave therm static centr sphere",
    endings=" ics ation ity on ism ometry al-frame ic-term oid",
    openings="""
        We investigate <a> black holes in <f> gravity.
        We study the <a> perturbations of a <a> spacetime.
        Exact solutions of the Einstein equations with <a> <ns> are found.
        We discuss the <a> collapse of a <n> in general relativity.
        The quasinormal modes of <a> black holes are computed for <f>.
        Numerical simulations of binary <ns> with mass ratio 1:<int> are reported.
        We examine a Friedmann universe filled with <a> <ns>.
    """,
    habits="""
        The line element reads $ds^2=-<x>(r)dt^2+dr^2/<x>(r)+r^2d\\Omega^2$.
        The spacetime is geodesically complete and free of <a> singularities.
        The weak energy condition is violated near the throat.
        The event horizon is located at $r_+=<num>M$.
        The gravitational waveform is accurate to <num> post-Newtonian order.
        The big bang singularity is replaced by a <a> bounce.
        Signals of this kind could be detected by LIGO, Virgo and LISA with a signal-to-noise ratio of <int>.
        The constraint equations are solved on a <a> hypersurface.
        The equation of state parameter crosses the phantom divide at redshift $z=<num>$.
        Hawking radiation and the first law of black hole thermodynamics are examined.
        The shadow radius and the deflection angle depend on <f>.
        The holonomy corrections become important at the Planck density.
        Test particles follow <a> geodesics with specific angular momentum <f>.
        The Komar mass and the angular momentum are conserved along the <a> flow.
    """,
    closings="""
        The cosmological implications of this result are outlined.
        Observational signatures in gravitational-wave data are considered.
        In the limit of vanishing spin the Schwarzschild solution is recovered.
    """,
    formulas="""
        $f(R)$
        $G_{\\mu\\nu}=8\\pi T_{\\mu\\nu}$
        $\\Lambda$
        $a(t)\\propto t^{<d>/<d>}$
        $R_{\\mu\\nu\\rho\\sigma}R^{\\mu\\nu\\rho\\sigma}$
        $M/r^<d>$
        $\\omega_{<d><d>}$
        $\\nabla_\\mu <X>^{\\mu\\nu}=0$
        $H_0$
        $\\ell=m=<d>$
        $(<d>+1)$-dimensional
        $w=-<num>$
        $\\kappa_{<x>}$
    """,
    titles="""
        <a> black holes and the <n>
        Quasinormal modes of <a> <ns>
        On <a> solutions of the Einstein equations
        Gravitational waves from <a> <ns>
        Cosmological <ns> in <a> gravity
    """,
    cross_lists="hep-th astro-ph.CO astro-ph.HE math-ph math.DG quant-ph",
    journals=("Class.Imag.Grav.", "Gen.Synth.Grav.", "Synth.Rev.D"),
    shared=SCIENCE,
    leads=SCIENCE_LEADS,
    tails=SCIENCE_TAILS,
)

Q_BIO = Domain(
    "q-bio",
    nouns="""
        neuron protein gene population cell network species mutation enzyme membrane synapse genome sequence
        epidemic infection pathogen receptor transcription ligand tissue tumor cortex spike fitness phenotype
        genotype allele phylogeny ecosystem predator prey metabolism pathway codon peptide folding-landscape
        ion-channel dendrite bacterium virus vaccine host antibody growth-rate diffusion signalling-cascade
        oscillator biomass habitat ribosome nucleotide recombination migration selection dose-response
    """,
    adjectives="""
        neural genetic cellular evolutionary metabolic stochastic cortical synaptic bacterial viral
        epidemiological phylogenetic molecular enzymatic immune heritable excitatory inhibitory intracellular
        extracellular ecological spatial temporal diploid eukaryotic microbial in-vivo in-vitro healthy
        diseased transcriptional regulatory susceptible infected
    """,
    verbs="""
        express inhibit regulate infect mutate bind fold replicate encode stimulate transcribe diffuse migrate
        compete adapt inherit cluster align model observe record
    """,
    adverbs="""
        biologically genetically spontaneously rapidly selectively independently reversibly weakly
        experimentally evolutionarily
    """,
    prefixes="neuro cyto bio phylo immuno endo myo bacterio entero chromo mito lipo glyco onco",
    stems="plast some kin gen phage blast tax troph derm zyme toxin cyte",
    endings=" ase in ogenesis al-layer osis ome ic-unit ity ation",
    openings="""
        Understanding how <ns> <v> <ns> is a central problem in biology.
        The spread of <a> infections in a population of <int> hosts is modelled.
        Recordings from <int> neurons in the <a> cortex reveal <a> <ns>.
        Living cells <v> <a> <ns> in response to their environment.
        We present a stochastic model of <a> gene expression in \\textit{<place>ella <x>ensis}.
        Phylogenetic trees of <int> species of \\emph{<place>us} are reconstructed from <a> sequences.
    """,
    habits="""
        The basic reproduction number is estimated as $R_0=<num>$ (95\\% CI <num>-<num>).
        Knocking out the <n> reduces growth by <int> percent (p < 0.0<d>).
        Patients were followed for <int> months after the second dose of the <n>.
        Firing rates of <int> Hz were observed in layer <d> of the <a> cortex.
        The population evolves by mutation, selection and genetic drift.
        We used the sequences of <int> proteins from the <who> database.
        Cells were grown at <int> degrees and imaged every <int> minutes.
        The model has only <d> parameters, fitted to data from <int> mice.
        Molecular dynamics of the peptide was run for <int> ns in explicit water.
        Predators and prey coexist when the <a> <n> is slow.
        These findings suggest that the <n> is <adv> <ved> by the <a> <n>.
        Fixation of the mutant allele takes <int> generations on average.
        The binding affinity of the ligand is <num> kcal/mol.
    """,
    closings="""
        Our framework may help in the design of vaccines and of <a> therapies.
        The code and the sequencing data are available from the authors.
        The biological significance of these observations is discussed.
    """,
    formulas="""
        $R_0=<num>$
        $dS/dt=-\\beta SI$
        $N_e$
        $k_{\\rm on}/k_{\\rm off}$
        $\\mu m$
        $p<0.0<d>$
        $Ca^{2+}$
        $K_d$
    """,
    titles="""
        A stochastic model of <a> <ns>
        <a> <ns> in the <a> cortex
        Evolution of <a> <ns> under selection
        How <ns> <v> <ns>: evidence from <int> genomes
        Epidemic spreading of <a> <ns>
    """,
    categories={
        "q-bio.NC": 28,
        "q-bio.PE": 26,
        "q-bio.QM": 18,
        "q-bio.BM": 12,
        "q-bio.MN": 8,
        "q-bio.GN": 5,
        "q-bio.TO": 3,
    },
    cross_lists="physics.bio-ph cond-mat.soft cs.LG stat.AP nlin.AO math.DS q-bio.QM",
    journals=("J.Imag.Biol.", "Synth.Comput.Biol."),
    since=2003,
    shared=SCIENCE,
    leads=SCIENCE_LEADS,
    tails=SCIENCE_TAILS,
)

CS = Domain(
    "cs",
    nouns="""
        algorithm network dataset model benchmark classifier graph query protocol agent transformer embedding
        compiler kernel gradient loss-function prompt token encoder decoder policy reward image pixel
        segmentation robot sensor channel packet latency throughput bandwidth cache user interface software
        bug test-suite developer privacy attack adversary cipher blockchain cloud scheduler language-model
        corpus parser speech translation hash-table runtime complexity-class automaton approximation code-word
        database recommendation
    """,
    adjectives="""
        neural deep supervised unsupervised self-supervised scalable distributed adversarial robust federated
        multi-agent end-to-end state-of-the-art pre-trained large-scale efficient convolutional semantic
        real-time low-resource multimodal open-source wireless polynomial-time online offline NP-hard greedy
        differentially-private explainable human-centered generative sparse parallel
    """,
    verbs="""
        train classify optimize cache schedule retrieve annotate segment encode parse compile encrypt deploy
        benchmark fine-tune generate evaluate outperform prune label augment release
    """,
    adverbs="""
        automatically efficiently empirically jointly significantly iteratively securely provably consistently
        dynamically
    """,
    prefixes="cyber auto meta multi hyper cross data micro inter pre un net byte soft",
    stems="cod train graph token learn query stream block node rank cluster thread pixel",
    endings=" er ing ization ware Net Former bench ability ification or",
    openings="""
        Deep neural networks have achieved remarkable success in <a> tasks.
        We present <X><n>, a <a> framework for <ving> <a> <ns>.
        Large language models are increasingly used to <v> <ns>.
        Existing approaches to <a> <ns> suffer from high latency and poor generalization.
        We consider the problem of <ving> <a> <ns> on a graph with $n$ vertices.
        Federated learning allows users to <v> <ns> without sharing their data.
        In this work, we introduce a novel dataset of <int>k <a> <ns>.
    """,
    habits="""
        Extensive experiments on <int> benchmarks show that our method outperforms the baselines by <num>\\%.
        Our approach achieves an accuracy of <num>\\% on the <who> dataset.
        We give an $O(n^<d> \\log n)$ time algorithm for this problem and prove that it is NP-hard in general.
        The code is available at https://example.org/<place>/<x><d><x>.
        The model is trained end-to-end on <int> GPUs for <int> hours.
        Specifically, we propose a <a> module that <vs> the <n>.
        Ablation studies confirm the importance of each <n>.
        To address these challenges, we leverage <a> <ns> and contrastive learning.
        Compared with <who>Net, it uses <int>x fewer parameters.
        A user study with <int> participants shows that the interface is <a>.
        The attack succeeds against <int> of <int> widely deployed <ns>.
        We evaluate throughput, latency and energy consumption on real hardware.
        Inference is <num> times faster than the <a> baseline.
        The F1 score improves from <num> to <num> in the few-shot setting.
    """,
    closings="""
        We release our code, data and pre-trained models to the community.
        We believe this work opens new directions for <a> systems.
        Source code is publicly available.
    """,
    formulas="""
        $O(n \\log n)$
        $k$-NN
        $(1+\\epsilon)$-approximation
        $\\mathbb{R}^{<int>}$
        $n^{<d>}$
        $<int>\\times <int>$
        $G=(V,E)$
        $\\ell_<d>$
    """,
    titles="""
        <X><x>Net: <a> <ns> for <a> <ns>
        Towards <a> <ns> with large language models
        A survey of <a> <n> techniques
        <who>: efficient <ns> for <a> systems
        Learning to <v> <ns> from <a> data
    """,
    categories={
        "cs.LG": 24,
        "cs.CV": 22,
        "cs.CL": 14,
        "cs.AI": 8,
        "cs.IT": 7,
        "cs.DS": 6,
        "cs.NI": 5,
        "cs.RO": 5,
        "cs.CR": 5,
        "cs.SE": 4,
    },
    cross_lists="stat.ML cs.AI cs.LG eess.IV math.OC physics.soc-ph cs.CL math.CO",
    journals=("Proc.Imag.Conf.", "Trans.Synth.Comput."),
    since=1998,
    shared=SCIENCE,
    leads=SCIENCE_LEADS,
    tails=SCIENCE_TAILS,
)

_NEIGHBOUR: dict[str, Any] = {
    "adjectives": """
        thermal quantum galactic ferromagnetic turbulent optical stellar superconducting entangled viscous
        crystalline magnetic photometric laminar doped polarized chaotic incompressible
    """,
    "verbs": "measure magnetize cool entangle image ionize scatter heat excite polarize observe",
    "adverbs": "experimentally optically thermally spectroscopically statistically coherently",
    "prefixes": "magneto thermo electro opto astro hydro spectro nano",
    "stems": "plasm spin flow phon therm photo dynam crystal",
    "endings": " on ics ometer ation ity ide graph",
    "openings": """
        We report observations of <a> <ns> with the <who> telescope.
        We measure the <a> <n> of <a> samples at temperatures below <int> K.
        A proof of the <who> theorem for <a> <ns> is given.
        The dynamics of <a> <ns> is studied by direct numerical simulation.
    """,
    "habits": """
        The sample contains <int> galaxies with redshifts between <num> and <num>.
        The critical temperature is $T_c=<num>$ K.
        The fidelity of the gate exceeds <num>\\%.
        Let $<X>$ be a smooth <n> over a field of characteristic $p$.
        The Reynolds number is varied from <int> to <int>.
        The spectrum shows a broad peak at <int> nm.
        The Lyapunov exponent changes sign at $<x>=<num>$.
    """,
    "formulas": """
        $T_c=<num>$
        $\\hbar\\omega$
        $<X>_{<d>}$
        $10^{<d>} M_\\odot$
        $\\mathrm{Re}=<int>$
    """,
    "titles": """
        <a> <ns> and the <n>
        Observation of <a> <ns>
        On a theorem of <who>
    """,
    "journals": ("Synth.Rev.Misc.",),
    "shared": SCIENCE,
    "leads": SCIENCE_LEADS,
    "tails": SCIENCE_TAILS,
}

OTHER = [
    Domain(
        name,
        nouns=f"{nouns} sample measurement temperature spectrum theorem",
        categories=categories,
        cross_lists=crossed,
        since=since,
        until=until,
        **_NEIGHBOUR,
    )
    for name, nouns, categories, crossed, since, until in (
        (
            "astro-ph",
            "galaxy star cluster halo supernova disk survey",
            {"astro-ph.CO": 1, "astro-ph": 1},
            "gr-qc",
            1992,
            2025,
        ),
        (
            "quant-ph",
            "qubit entanglement gate photon trap measurement state",
            {"quant-ph": 1},
            "hep-th cs.IT",
            1994,
            2025,
        ),
        (
            "math",
            "manifold group ring lemma sheaf module bundle",
            {"math.AG": 1, "math-ph": 1},
            "hep-th",
            1993,
            2025,
        ),
        (
            "physics",
            "laser fluid wave beam pulse jet cavity",
            {"physics.optics": 1, "physics.flu-dyn": 1},
            "cs.CE",
            1996,
            2025,
        ),
        (
            "dead",
            "attractor orbit map billiard trajectory",
            {"chao-dyn": 2, "alg-geom": 1, "q-alg": 1},
            "",
            1993,
            1999,
        ),
    )
]

# Prose from outside science, for the text that a base model knows before it is adapted.

_PROSE = """
    It took <int> minutes, which is <adv> longer than <who> had promised.
    My neighbour <who> always <vs> <np> first.
    Nobody in <place> would <v> <np> like that.
    If <np> looks <a>, <v> it again.
    The <n> was <a>, the <n> was not.
    After <int> years we still <v> <np> every spring.
    You need a <a> <n> and a little patience.
    "That <n> is <a>," said <who>, and <ved> <np>.
    On Sunday morning <who> <ved> the <n> and the <n>.
    It costs about <int> coins in the shop at <place>.
    There were <int> of us, and only one <a> <n>.
    Never <v> the <n> before the <n> is <a>.
"""
_PROSE_LEADS = """
    Then
    As usual,
    With a bit of luck
    To be fair,
    In <place>
    According to <who>,
    If the <n> is <a>,
    Because of the <ns>
    Once the <n> is <ved>,
    By the way,
    After <int> minutes
"""
_PROSE_TAILS = """
    before <who> comes home
    with a <a> <n>
    next to the <n>
    like they do in <place>
    and <v> the <ns>
    while the <n> is still <a>
    unless the <ns> are <a>
    for <int> days
    because <who> likes <a> <ns>
    and not a moment later
"""
_HOME: dict[str, Any] = {
    "leads": _PROSE_LEADS,
    "tails": _PROSE_TAILS,
    "adverbs": "slowly gently quickly carefully happily early late badly nearly twice",
    "shared": _PROSE,
    "titles": "The <a> <n>",
}

EVERYDAY = [
    Domain(
        "cooking",
        nouns="""
            onion butter pan dough soup oven carrot garlic sauce kettle lemon bread flour pepper bowl spoon
            cheese apple pudding stew recipe knife tomato potato salad
        """,
        adjectives="warm crisp salty sweet golden tender creamy fresh spicy burnt ripe sour thick homemade",
        verbs="stir chop bake simmer roast pour whisk season peel boil knead taste serve",
        prefixes="butter honey plum nut oat rye herb bean ginger apple",
        stems="cake pie broth bun jam loaf mash roll bake",
        endings=" let ie ling y-mix",
        openings="""
            Start with <int> grams of <n> and a <a> <n>.
            My grandmother in <place> used to <v> <np> with <ns>.
            For this dish you <v> the <ns> until they are <a>.
        """,
        habits="""
            Add <d> spoons of <n> and let it simmer for <int> minutes.
            Cover the pan and <v> the <ns> over low heat.
            Sprinkle with salt and serve with a slice of <n>.
            The oven should be at <int> degrees.
            Leave the dough to rise under a damp cloth.
            A pinch of sugar makes the <n> less sour.
        """,
        **_HOME,
    ),
    Domain(
        "gardening",
        nouns="""
            rose soil spade seed bean hedge compost pot tulip shed weed lawn apple-tree bulb root leaf snail
            bed watering-can fence pond cutting greenhouse
        """,
        adjectives="""
            damp sunny shady muddy green wilted early hardy thorny tall sandy overgrown bare blooming
        """,
        verbs="plant water prune weed rake harvest sow mulch trim transplant cover",
        prefixes="moss elder black rose thorn bram marsh ivy fern dew",
        stems="berry wort weed bush grass bell root bloom",
        endings=" let y ling er",
        openings="""
            In early spring the <ns> in <place> need <a> soil.
            Anyone with a <a> garden knows the trouble with <ns>.
            We moved the <ns> behind the <n> last autumn.
        """,
        habits="""
            Plant them <int> centimetres apart and water well.
            Frost in the night can kill a <a> <n>.
            The snails ate <int> of the <ns> before breakfast.
            Cut the stems back to the second bud.
            Bees love the <ns> along the fence.
        """,
        **_HOME,
    ),
    Domain(
        "travel",
        nouns="""
            train ticket suitcase hotel harbour bridge map bus castle market island ferry mountain museum
            street platform passport beach village guide café square room
        """,
        adjectives="""
            old crowded narrow quiet cheap foreign delayed steep lovely distant noisy painted local empty
        """,
        verbs="visit book cross board miss explore photograph pack leave climb carry",
        prefixes="north south old new lower upper white river castle mill",
        stems="port gate ham ford haven mouth ton field",
        endings=" er ish side s-road",
        openings="""
            We took the night train from <place> to <place>.
            The old town of <place> lies on a <a> hill.
            In the summer of 19<int> my sister and I went to <place>.
        """,
        habits="""
            The ferry leaves at <d> o'clock from the <a> harbour.
            From the castle you see the roofs of <place>.
            Our room had <d> beds and a view of the <n>.
            Ask for the key at the café across the square.
            It rained all the way to <place>.
        """,
        **_HOME,
    ),
    Domain(
        "sport",
        nouns="""
            goal match team coach ball referee season penalty racket finish lap whistle stadium crowd runner
            keeper captain trophy bench league bicycle medal training
        """,
        adjectives="""
            fast tired young unbeaten brave injured noisy final weak brilliant lucky away home late
        """,
        verbs="score kick pass win train tackle defend jump coach shout save",
        prefixes="over under half mid long short full back",
        stems="sprint pass shot run serve throw stroke kick",
        endings=" er ing s-line",
        openings="""
            <place> beat <place> by <int> to <d> on Saturday.
            The <a> team from <place> has a new coach.
            It was the last match of a <a> season.
        """,
        habits="""
            The goal came in the <int>th minute after a corner.
            <who> ran the last lap in <int> seconds.
            The referee gave a penalty and the crowd whistled.
            They are now <d>th in the league.
            The captain left the pitch with a sore knee.
        """,
        **_HOME,
    ),
    Domain(
        "crafts",
        nouns="""
            needle yarn stitch wool sleeve button hammer nail plank drawer glue brush varnish saw chisel
            thread cloth pattern scarf shelf screw basket ribbon
        """,
        adjectives="""
            woollen loose tight smooth wooden rough striped knitted crooked sharp sturdy neat dusty hand-made
        """,
        verbs="knit sew sand paint measure cut glue saw stitch fold polish hang",
        prefixes="cross hand thread wood over under needle patch",
        stems="stitch work weave knot seam join fold",
        endings=" er ing let",
        openings="""
            For the <a> scarf you need <int> balls of <n>.
            This <n> was made from <d> planks and a <a> <n>.
            <who> from <place> teaches how to <v> a <n>.
        """,
        habits="""
            Cast on <int> stitches and work in rib for <d> rows.
            Sand the wood along the grain and wipe off the dust.
            Let the glue dry overnight before you <v> the <n>.
            Measure twice and cut once.
            Turn the work and knit to the end of the row.
        """,
        **_HOME,
    ),
    Domain(
        "weather",
        nouns="""
            rain cloud wind storm frost fog snow thunder sunshine drizzle coast valley forecast umbrella
            evening shower breeze hail puddle morning roof coat
        """,
        adjectives="grey windy cold mild heavy bright wet stormy icy dry cloudy humid gusty northern",
        verbs="drift clear freeze melt gather pass expect follow soak cover brighten",
        prefixes="thunder snow rain sun wind ice sea storm",
        stems="fall cloud drift storm shine burst gust",
        endings=" s er y-spell",
        openings="""
            Tomorrow will be <a> in <place> and along the coast.
            A <a> wind from the north brings <ns> to <place>.
            After a <a> morning the sky over <place> cleared.
        """,
        habits="""
            Temperatures will fall to <int> degrees in the valleys.
            Showers are expected before noon, with hail in places.
            The fog did not lift until <d> in the afternoon.
            Wear a coat and take an umbrella.
            It was the wettest month in <int> years.
        """,
        **_HOME,
    ),
]
