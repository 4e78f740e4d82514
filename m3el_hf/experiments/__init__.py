"""Questions asked of systems by experiment: under which conditions they still link, and what of them it takes."""
