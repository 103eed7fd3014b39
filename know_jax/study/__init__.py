"""The transfer study: does predicted knowledge help downstream?"""
