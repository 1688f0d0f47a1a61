// Starts of abstracts that nobody wrote: made up for this page.
export const EXAMPLES: { name: string; text: string }[] = [
  {
    name: "A brane in a teapot",
    text: String.raw`We study a stack of $N$ branes that wraps the handle of a teapot in $AdS_5 \times S^5$. In the limit $N \to \infty$ the spectrum of the lid`,
  },
  {
    name: "A Higgs boson on holiday",
    text: String.raw`We compute the branching ratio of a Higgs boson of mass $m_H = 125\,\mathrm{GeV}$ that decays only on Sundays. At order $\alpha_s^2$ the correction`,
  },
  {
    name: "A horizon that hums",
    text: String.raw`We consider a black hole whose horizon hums at the frequency $\omega = \frac{1}{8 \pi M}$ and ask whether the tune obeys $\nabla_\mu T^{\mu\nu} = 0$. We find`,
  },
  {
    name: "A soup near criticality",
    text: "The soup needs more salt near its critical point. We show that the garden",
  },
];
