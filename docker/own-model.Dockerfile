FROM vitserve:0.1.0-cpu
COPY my-bundle /models/mine
ENV VITSERVE_BUNDLE=/models/mine
