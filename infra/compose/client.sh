# shellcheck shell=bash
# Lets this machine's `rcnn`, `prefect`, `mlflow` and `ray` use the stack of compose.yaml: source infra/compose/client.sh
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/.env"
export PREFECT_API_URL=http://127.0.0.1:4200/api PREFECT_API_AUTH_STRING="admin:$STACK_PREFECT_PASSWORD"
export MLFLOW_TRACKING_URI=http://127.0.0.1:5000 MLFLOW_TRACKING_USERNAME=admin MLFLOW_TRACKING_PASSWORD="$STACK_MLFLOW_PASSWORD"
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 RAY_AUTH_MODE=token RAY_AUTH_TOKEN="$STACK_RAY_TOKEN"
export AWS_ACCESS_KEY_ID=rcnn AWS_SECRET_ACCESS_KEY="$STACK_S3_SECRET" AWS_EC2_METADATA_DISABLED=true
export RCNN_STORAGE="s3://rcnn/storage?scheme=http&endpoint_override=127.0.0.1:8333&region=us-east-1"
export RCNN_TRACKING__URI=$MLFLOW_TRACKING_URI
