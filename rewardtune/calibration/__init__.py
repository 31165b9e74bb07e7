"""`rewardtune rewards calibrate`: rewards beside a team's own labels. Which to train on, and which to keep as judge?"""
