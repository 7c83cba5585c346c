"""Results as published, to set beside one's own.

``paper_results.csv`` holds the numbers of the result tables of *COVR: Collaborative Optimization of VLMs and RL Agent
for Visual-Based Control* (Xia et al., AAAI 2026): Tables 1 to 5 and 10 to 18. Rows of other methods are as that paper
prints them, measured or quoted by its authors; it does not always say which.
"""

from covr_lightning.published.results import Metric, PublishedResult, mean_over_tasks, published_results

__all__ = ["Metric", "PublishedResult", "mean_over_tasks", "published_results"]
