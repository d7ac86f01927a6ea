FROM vitserve:0.2.0-cpu
COPY my-bundle /models/mine
ENV VITSERVE_BUNDLE=/models/mine
