// How the site's search ranks results. Sphinx's own numbers, and one rule more: a page whose title has
// a word of the query comes before pages that have it in the title of a section.
var Scorer = {
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
  score: ([, title, anchor, , score]) => {
    const query = new URLSearchParams(window.location.search).get("q") || "";
    const words = query.toLowerCase().split(/\W+/).filter(Boolean);
    const named = words.some((word) => title.toLowerCase().includes(word));
    return anchor === "" && named ? score + 10 : score;
  },
};
