"""What a conflict map says: verdict, summary, plots, page, and what to do next.

verdict            what a map says and what to do, from one rule, for analyze, ranges and the page
summary            the conclusion: `summarize(reading, n) -> ConflictSummary`
plots              figures of a map and of its partition
page, next_steps   conflict.html and the files of an analysis: `write_report(summary, out)`
"""
