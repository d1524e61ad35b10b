"""The lessons: five questions about diffusion models, each a sweep on two CPU cores, and what came out.

run.py       trains a lesson's sweep and scores its runs, through the commands; plain results in lesson.json
facts.py     what needs no training: closed forms for the same images
compare.py   means, standard errors, and whether a difference is one
words.py     from results to sentences: nothing in them is known before it is measured
pictures.py  from results to PNG files
page.py      all lessons on one page
"""
