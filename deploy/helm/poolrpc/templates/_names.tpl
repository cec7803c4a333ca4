{{- define "poolrpc.name" -}}
{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- define "poolrpc.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "poolrpc.labels" -}}
{{ include "poolrpc.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* kubelet's gRPC probe does not support TLS, so with TLS the image's command checks over the unix socket. */}}
{{- define "poolrpc.probe" -}}
{{- if .Values.tls.secretName -}}
exec: {command: [poolrpc, health, --timeout, "3"]}
{{- else -}}
grpc: {port: 50051}
{{- end }}
{{- end }}
