#!/bin/sh
# Sends an image to vitserve in the three accepted forms: sh curl.sh IMAGE [URL]
set -eu
image=$1
url=${2:-http://127.0.0.1:8000}/v1/classify

echo "Raw body, with options in the query, and the response's headers:"
curl --silent --show-error --fail-with-body --include \
    --header "Content-Type: application/octet-stream" --header "Vitserve-Priority: 7" \
    --data-binary "@$image" "$url?top_k=2&timeout_ms=5000"

echo
echo "Multipart form, which may hold several images:"
curl --silent --show-error --fail-with-body --form "image=@$image" --form "image=@$image" --form top_k=1 "$url"

echo
echo "JSON with base64:"
printf '{"images": ["%s"], "top_k": 1}' "$(base64 < "$image" | tr -d '\n')" |
    curl --silent --show-error --fail-with-body --header "Content-Type: application/json" --data-binary @- "$url"
echo
