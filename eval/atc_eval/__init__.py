"""Behind the commands of `eval/`: what is compared (`method`), how it is drawn, scored, timed and reported."""
